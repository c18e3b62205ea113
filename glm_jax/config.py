"""The default configuration, one section a room, and the checks that turn a user's slip into one clear line.

An experiment is a Python file whose `get_config()` starts from `default_config()` and changes what it is about.
Flags (`--config.model.num_layers=4`) come on top. `resolve` then fills in and checks the whole. No jax in here:
`glm-jax config` answers at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from glm_jax.config_checks import check, convert, flatten
from glm_jax.errors import UserError

if TYPE_CHECKING:
    Config = Any  # its keys are checked by `resolve`, not by a type checker
else:
    Config = ConfigDict

# What a finished run's numbers depend on. Everything else may change when a run goes on.
FROZEN_KEYS = ("seed", "model", "data.seq_length", "data.tokenizer")

# How a run is carried out and reported: these do not alter its numbers (beyond rounding).
OPERATIONAL_KEYS = ("mesh", "pipeline", "data.cache", "train.log_every", "train.eval_every", "train.eval_rows",
                    "train.save_every", "train.save_minutes", "train.keep", "train.keep_every", "train.profile",
                    "train.wandb", "interventions")  # fmt: skip


def source(**changes: Any) -> Config:
    """Give one entry of `data.sources`: the defaults, and `changes`, among which `path` or `sample` must be."""
    defaults = {
        "path": "",  # a file, a directory or a glob; takes the place of the sample
        "sample": "",  # the name of a sample corpus, see glm_jax/data/samples.py
        "format": "text",  # text (a blank line ends a document), jsonl, jsonl.zst, json (an array), parquet
        "field": "text",  # the field or column that holds the text; "title, meta.body" joins two, one of them nested
        "normalise": "",  # any of nfc, nfkc (Unicode's forms) and newlines (\r\n to \n), with commas between
        "language": "en",
        "weight": 1.0,  # share of rows, relative to the other sources'
    }
    return ConfigDict(defaults | changes)


def instructions(**changes: Any) -> Config:
    """Give one entry of `data.instructions`: the defaults, and `changes`, among which `path` or `sample` must be."""
    defaults = {
        "path": "",  # a file, a directory or a glob of .jsonl, .jsonl.zst or .parquet records
        "sample": "",  # the name of an example set, see glm_jax/data/instruction_samples.py
        "dataset": "",  # which of GLM-130B's data sets it is, see glm_jax/data/registry.py; empty: another
        "templates": "",  # PromptSource's templates.yaml, or .jinja files; with `dataset`, also the folder of all its
        # templates; empty: records have `text` and `target`
        "cap": 0,  # samples at most; 0: what GLM-130B took of `dataset`, all of another
        "weight": 0.0,  # share of instruction rows, relative to the others'; 0: the number of samples
    }
    return ConfigDict(defaults | changes)


def _data() -> Config:
    """Give `data`: what is read, and how."""
    data: Config = ConfigDict()
    data.cache = ""  # where fetched text, tokenizers and shards live; empty: the user's cache folder
    data.sources = ConfigDict()
    data.seed = (
        -1
    )  # of the order of the rows and of their blanks; -1: the run's. Another one reshuffles what is to come
    data.seq_length = 256  # tokens a row, context and targets together
    data.heldout = 0.05  # share of the documents kept for evaluation, chosen by hash
    data.near_duplicates = 0.8  # documents at least this similar (Jaccard) count as one; 0: exact copies only
    data.tokenizer = ConfigDict()
    data.tokenizer.vocab_size = 8000  # pieces to train, special tokens included
    data.tokenizer.path = ""  # read this instead: a tokenizer.model of ours, or the official ice_text.model
    data.tokenizer.pinned = False  # ice_text.model as in 2022: newlines, tabs and runs of spaces are lost
    data.temperature = 0.0  # above 0: weights are times tokens ** (1 / temperature); 1 draws sources by size
    data.weights = ()  # history of the sources' weights: ((0, {"en": 1.0}), (500_000, {"en": 1.0, "zh": 1.0}))
    data.instructions = ConfigDict()  # prompts with answers, by name; see `instructions`
    data.blanks = _blanks()
    return data


def _blanks() -> Config:
    """Give `data.blanks`: shares of rows, and how blanks are drawn (glm_jax/data/blank_options.py says more)."""
    blanks: Config = ConfigDict()
    blanks.mask = 0.3  # share of rows with [MASK] spans (paper, section 2.2)
    blanks.gmask = 0.7  # share of rows with a [gMASK] suffix
    blanks.smask = 0.0  # share of rows with [sMASK] sentences
    blanks.instruction = 0.0  # share of rows with prompts and answers, from data.instructions
    blanks.history = ()  # instead of these shares, their history over samples: ((0, {"mask": 1.0}), (9000, {...}))
    blanks.mask_ratio = 0.15  # of the tokens, in [MASK] spans
    blanks.mean_span = 3.0  # Poisson, restricted to 1..longest_span
    blanks.longest_span = 39
    blanks.single_span_prob = 0.0  # [MASK] samples with one span
    blanks.short_seq_prob = 0.0  # [MASK] segments that hold two shorter samples
    blanks.shortest_seq = 1  # tokens that such a sample keeps at least, with cut_targets
    blanks.gmask_min_ratio = 0.2  # a [gMASK] target is uniform from this share to all of the text
    blanks.gmask_eop = True  # a [gMASK] target ends in eop
    blanks.gmask_infill_prob = 0.0  # [gMASK] blanks anywhere, not at the end
    blanks.smask_ratio = 0.15
    blanks.block_mask_prob = 0.0  # target inputs replaced by block_mask_token
    blanks.block_mask_token = -1
    blanks.mask_segments = 1  # samples that share a row
    blanks.gmask_segments = 1
    blanks.smask_segments = 1
    blanks.instruction_segments = 4
    blanks.whole_documents = False  # pack rows with whole documents, as many as they hold
    blanks.cut_targets = False  # the released model's quirk: 500 tokens into 512 places, [MASK] targets cut
    blanks.replacement = False  # the released model's quirk: rows drawn with replacement
    return blanks


def _train() -> Config:
    """Give `train`: how long, on how much at a time, and what is watched and kept."""
    train: Config = ConfigDict()
    train.steps = 1000
    train.global_batch = 16  # rows an optimizer step
    train.microbatches = 1  # the batch is processed in this many parts, gradients summed
    train.precision = "float32"  # of weights and activations; master params, moments and sums are float32
    train.loss_scale = ConfigDict()  # float16 only
    train.loss_scale.initial = 65536.0
    train.loss_scale.window = 2000  # finite steps in a row that double it
    train.loss_scale.hysteresis = 2  # non-finite steps that halve it
    train.loss_scale.minimum = 1.0
    train.embedding_shrink = ConfigDict()  # embedding gradient shrink (paper, section 3.2)
    train.embedding_shrink.alpha = 1.0  # the share of the gradient that stays; 1: off
    train.embedding_shrink.history = ()  # instead: knots over steps, ((6000, 0.1), (6500, 1.0))
    train.embedding_shrink.logits = False  # also on the path through the head, which is tied
    train.loss_normalization = "tokens"  # a mean over the global batch's targets; microbatch: over row means
    train.batch_ramp = ()  # (first batch, increment, samples): grows in equal parts of the samples
    train.skip_steps = ()  # ((40_701, 40_900),): steps that are passed over with their data, the last included
    train.spike = ConfigDict()  # what to do when the loss or the gradient norm leaves its running band
    train.spike.rollbacks = 0  # go back to the last checkpoint and pass over the data, so often at most; 0: never
    train.spike.window = 100  # steps of the band's running mean and deviation; it watches after as many
    train.spike.deviations = 6.0  # the band's width above the mean
    train.log_every = 10
    train.eval_every = 500  # 0: never; else also before the first step and at the end
    train.eval_rows = 128  # held-out rows a source
    train.save_every = 250  # steps
    train.save_minutes = 0.0  # also when so much time has passed since the last; 0: never
    train.keep = 3  # the newest checkpoints
    train.keep_every = 0  # also those of every so many steps; 0: none
    train.profile = ()  # (first, last) steps that JAX's profiler traces into the workdir's profile/
    train.wandb = ""  # a Weights & Biases project to report to as well
    return train


def default_config() -> Config:
    """Give every key with its default: a model for a laptop; experiments say what differs."""
    config: Config = ConfigDict()
    config.seed = 1234

    config.model = ConfigDict()
    config.model.num_layers = 4
    config.model.hidden_size = 128
    config.model.num_heads = 4
    config.model.ffn_size = 344  # GeGLU's 8/3 of the hidden size, as in GLM-130B
    config.model.norm = "deepnorm"
    config.model.position = "rope"
    config.model.activation = "geglu"
    config.model.attention_dropout = 0.0
    config.model.hidden_dropout = 0.0
    config.model.embedding_norm = False
    config.model.rope_angles = "float32"  # float16: the released inference code's tables
    config.model.score_scaling = True
    config.model.pb_relax = 0.0  # alpha; 0: off
    config.model.initialisation = "xavier"
    config.model.max_length = 0  # rows of a position table; 0: data.seq_length
    config.model.vocab_size = 0  # rows of the embedding; 0: the tokenizer's, padded to a multiple of vocab_multiple
    config.model.vocab_multiple = 128

    config.data = _data()

    config.mesh = ConfigDict()
    config.mesh.data = 1  # one of the three may be -1: the rest of the devices
    config.mesh.pipeline = 1
    config.mesh.tensor = 1
    config.mesh.collective_timeout = 20.0  # seconds after which the other processes of a CPU run take one for dead
    config.mesh.zero = 1  # state is split over `data`; 3: the blocks' weights too, without a pipeline

    config.pipeline = ConfigDict()
    config.pipeline.schedule = "1f1b"
    config.pipeline.stash = "layer"  # what the backward pass finds: inputs of layers or stages, or all (no recomputing)

    config.train = _train()

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-4
    config.optimizer.warmup_samples = 1600
    config.optimizer.rewarm = ()  # ((22_800, 500),): from a step on, the rate climbs anew from 0 over so many steps
    config.optimizer.decay_samples = 0  # cosine to min_lr ends here; 0: with the last step
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1  # not on layer norms and biases
    config.optimizer.clip_norm = 1.0

    # What changes in mid-run: ((33_600, {"train.embedding_shrink.alpha": 0.5}),) from the step after 33,600 on
    config.interventions = ()
    return config


def closest(key: str, known: list[str]) -> str:
    """Say which known key was probably meant, or where to find them all."""
    matches = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    if matches:
        return f"did you mean {matches[0]}?"
    return "`glm-jax config show --config FILE` lists the keys"


def resolve(config: Config) -> Config:
    """Fill in what an experiment left out and check every key, type and value.

    Args:
        config: what `get_config()` returned, flags applied.

    Returns:
        A new, locked ConfigDict with every key of `default_config()`.

    Raises:
        UserError: a key that does not exist (with the nearest that does), a value of the wrong type or out of range.
    """
    full = default_config()
    known = [key for key, _ in flatten(full)]
    for key, value in flatten(config):
        if key.startswith(("data.sources.", "data.instructions.")):
            continue
        if key not in known:
            raise UserError(f"unknown config key {key}: {closest(key, known)}")
        _assign(full, key, value)
    for name, keys in config.get("data", {}).get("sources", {}).items():
        full.data.sources[name] = _resolve_entry(f"data.sources.{name}", keys, source())
    for name, keys in config.get("data", {}).get("instructions", {}).items():
        full.data.instructions[name] = _resolve_entry(f"data.instructions.{name}", keys, instructions())
    check(full)
    _check_interventions(full)
    return full.lock()


def _resolve_entry(where: str, keys: Any, filled: Config) -> Config:
    """Put the keys of an entry that the user named into its defaults."""
    if not isinstance(keys, Mapping | ConfigDict):
        raise UserError(f"{where} is {keys!r}: give it keys, such as path and weight")
    for key, value in keys.items():
        if key not in filled:
            raise UserError(f"unknown config key {where}.{key}: {closest(key, list(filled))}")
        filled[key] = convert(f"{where}.{key}", value, filled[key])
    return filled


def in_section(key: str, sections: tuple[str, ...]) -> bool:
    """Say whether a dotted key is one of `sections` or lies in one."""
    return any(key == section or key.startswith(f"{section}.") for section in sections)


def with_changes(config: Config, changes: Mapping[str, Any]) -> Config:
    """Give a resolved config with the dotted keys of `changes` set; None takes a key away."""
    plain = config.to_dict()
    for key, value in changes.items():
        *path, last = key.split(".")
        section = plain
        for part in path:
            section = section.setdefault(part, {})
            if not isinstance(section, dict):
                raise UserError(f"unknown config key {key}: {key.rpartition('.')[0]} has no parts")
        if value is None:
            section.pop(last, None)
        else:
            section[last] = value
    for entries in (plain["data"]["sources"], plain["data"]["instructions"]):
        for name in [name for name, keys in entries.items() if not keys]:
            del entries[name]  # all of it was taken away
    return resolve(ConfigDict(plain))


def _check_interventions(config: Config) -> None:
    """Check that every intervention names keys that may change, and leaves a config that can be."""
    bare = config.copy_and_resolve_references()
    bare.interventions = ()
    for step, changes in sorted(config.interventions, key=lambda pair: pair[0]):
        if step < 0:
            raise UserError(f"interventions name step {step}: they take effect after a step, 0 is the start")
        for key in changes:
            if in_section(key, (*FROZEN_KEYS, *OPERATIONAL_KEYS)):
                raise UserError(f"interventions at step {step} name {key}, which cannot change in mid-run")
        bare = with_changes(bare, changes)


def _assign(config: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    config[last] = convert(key, value, config[last])


def to_json(config: Config) -> str:
    """Write a resolved config as the JSON of `config.json` in a workdir."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Config:
    """Read what `to_json` wrote, resolved again so that keys added since have their defaults."""
    return resolve(ConfigDict(json.loads(text)))


def original_glm(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, longest: int) -> Config:
    """Give what the sizes of the original GLM share: Pre-LN, tanh GELU, two learned position streams, [MASK] alone.

    The [gMASK] values are the published code's defaults, for the sizes that give it a share. Its blanks differ from
    ours in this: a class token begins each sample; no span holds a document's end; a batch has one [gMASK] length;
    410M and 515M mark document spans with [MASK]. Block masking (0.1 in 2B and 10B) is off, as our tokenizers have no
    dBLOCK: with one that has, set data.blanks.block_mask_prob and block_mask_token.

    Args:
        num_layers, hidden_size, num_heads: of the size.
        vocab_size: rows of the embedding, padding included.
        longest: tokens of a row; the position tables have one row more (arXiv 2103.10360 and its published code).
    """
    config = default_config()
    config.model.num_layers = num_layers
    config.model.hidden_size = hidden_size
    config.model.num_heads = num_heads
    config.model.ffn_size = 4 * hidden_size
    config.model.norm = "pre"
    config.model.position = "learned_2d"
    config.model.activation = "gelu_tanh"
    config.model.initialisation = "normal"
    config.model.attention_dropout = 0.1
    config.model.hidden_dropout = 0.1
    config.model.score_scaling = False
    config.model.vocab_size = vocab_size
    config.model.max_length = longest + 1
    config.data.seq_length = longest
    config.data.blanks.update(mask=1.0, gmask=0.0, gmask_min_ratio=0.5, gmask_infill_prob=0.5)
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    return config
