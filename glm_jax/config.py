"""The default configuration, one section a room, and the checks that turn a user's slip into one clear line.

An experiment is a Python file whose `get_config()` starts from `default_config()` and changes what it is about.
Flags (`--config.model.num_layers=4`) come on top. `resolve` then fills in and checks the whole. No jax in here:
`glm-jax config` answers at once.
"""

from __future__ import annotations

import difflib
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from ml_collections import ConfigDict

from glm_jax.errors import UserError

if TYPE_CHECKING:
    Config = Any  # its keys are checked by `resolve`, not by a type checker
else:
    Config = ConfigDict

# What a finished run's numbers depend on. Everything else may change when a run goes on.
FROZEN_KEYS = ("seed", "model", "data.seq_length", "data.tokenizer")

NORMS = ("deepnorm", "post", "pre", "sandwich")
POSITIONS = ("rope", "alibi", "learned_2d")
ACTIVATIONS = ("geglu", "gelu", "gelu_tanh")
ROPE_ANGLES = ("float32", "float16")
INITIALISATIONS = ("xavier", "normal", "largescale")
FORMATS = ("text", "jsonl", "jsonl.zst", "parquet")
PRECISIONS = ("float32", "bfloat16", "float16")


def source(**changes: Any) -> Config:
    """Give one entry of `data.sources`: the defaults, and `changes`, among which `path` or `sample` must be."""
    defaults = {
        "path": "",  # a file, a directory or a glob; takes the place of the sample
        "sample": "",  # the name of a sample corpus, see glm_jax/data/samples.py
        "format": "text",  # text (a blank line ends a document), jsonl, jsonl.zst, parquet
        "field": "text",  # the field or column that holds the text
        "language": "en",
        "weight": 1.0,  # share of rows, relative to the other sources'
    }
    return ConfigDict(defaults | changes)


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

    config.data = ConfigDict()
    config.data.cache = ""  # where fetched text, tokenizers and shards live; empty: the user's cache folder
    config.data.sources = ConfigDict()
    config.data.seq_length = 256  # tokens a row, context and targets together
    config.data.heldout = 0.05  # share of the documents kept for evaluation, chosen by hash
    config.data.near_duplicates = 0.8  # documents at least this similar (Jaccard) count as one; 0: exact copies only
    config.data.tokenizer = ConfigDict()
    config.data.tokenizer.vocab_size = 8000  # pieces to train, special tokens included
    config.data.blanks = ConfigDict()
    config.data.blanks.mask = 0.3  # share of rows with [MASK] spans (paper, section 2.2)
    config.data.blanks.gmask = 0.7  # share of rows with a [gMASK] suffix

    config.mesh = ConfigDict()
    config.mesh.data = 1
    config.mesh.pipeline = 1
    config.mesh.tensor = 1

    config.train = ConfigDict()
    config.train.steps = 1000
    config.train.global_batch = 16  # rows an optimizer step
    config.train.microbatches = 1  # the batch is processed in this many parts, gradients summed
    config.train.precision = "float32"  # of weights and activations; master params, moments and sums are float32
    config.train.loss_scale = ConfigDict()  # float16 only
    config.train.loss_scale.initial = 65536.0
    config.train.loss_scale.window = 2000  # finite steps in a row that double it
    config.train.loss_scale.hysteresis = 2  # non-finite steps that halve it
    config.train.loss_scale.minimum = 1.0
    config.train.log_every = 10
    config.train.eval_every = 500  # 0: never; else also before the first step and at the end
    config.train.eval_rows = 128  # held-out rows a source
    config.train.save_every = 250
    config.train.keep = 3  # checkpoints

    config.optimizer = ConfigDict()
    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-4
    config.optimizer.warmup_samples = 1600
    config.optimizer.decay_samples = 0  # cosine to min_lr ends here; 0: with the last step
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1  # not on layer norms and biases
    config.optimizer.clip_norm = 1.0
    return config


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf, in order."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


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
        if key.startswith("data.sources."):
            continue
        if key not in known:
            raise UserError(f"unknown config key {key}: {closest(key, known)}")
        _assign(full, key, value)
    for name, keys in config.get("data", {}).get("sources", {}).items():
        full.data.sources[name] = _resolve_source(name, keys)
    _check(full)
    return full.lock()


def _resolve_source(name: str, keys: Any) -> Config:
    if not isinstance(keys, Mapping | ConfigDict):
        raise UserError(f"data.sources.{name} is {keys!r}: give it keys, such as path, format and language")
    filled = source()
    for key, value in keys.items():
        if key not in filled:
            raise UserError(f"unknown config key data.sources.{name}.{key}: {closest(key, list(filled))}")
        filled[key] = _convert(f"data.sources.{name}.{key}", value, filled[key])
    return filled


def _convert(key: str, value: Any, default: Any) -> Any:
    """Return `value` in the type of `default`; an int may stand for a float, nothing else is converted."""
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{key} is {value!r}, it must be of type {type(default).__name__} (such as {default!r})")
    return value


def _assign(config: Config, key: str, value: Any) -> None:
    *path, last = key.split(".")
    for part in path:
        config = config[part]
    config[last] = _convert(key, value, config[last])


def _check(config: Config) -> None:
    """Check what can be checked without data and devices."""
    model, data, train, optimizer = config.model, config.data, config.train, config.optimizer
    positive = ("model.num_layers", "model.hidden_size", "model.num_heads", "model.ffn_size", "model.vocab_multiple",
                "data.seq_length", "data.tokenizer.vocab_size", "mesh.data", "mesh.pipeline", "mesh.tensor",
                "train.steps", "train.global_batch", "train.microbatches", "train.log_every", "train.eval_rows",
                "train.save_every", "train.keep")  # fmt: skip
    values = dict(flatten(config))
    for key in positive:
        if values[key] < 1:
            raise UserError(f"{key} is {values[key]}, it must be at least 1")
    for key in ("train.eval_every", "optimizer.warmup_samples", "optimizer.decay_samples", "optimizer.weight_decay",
                "data.blanks.mask", "data.blanks.gmask"):  # fmt: skip
        if values[key] < 0:
            raise UserError(f"{key} is {values[key]}, it must not be negative")
    for key in ("model.attention_dropout", "model.hidden_dropout", "data.heldout", "data.near_duplicates",
                "optimizer.beta1", "optimizer.beta2"):  # fmt: skip
        if not 0 <= values[key] < 1:
            raise UserError(f"{key} is {values[key]}, it must be at least 0 and below 1")
    choices_of = {
        "model.norm": NORMS,
        "model.position": POSITIONS,
        "model.activation": ACTIVATIONS,
        "model.rope_angles": ROPE_ANGLES,
        "model.initialisation": INITIALISATIONS,
        "train.precision": PRECISIONS,
    }
    for key, choices in choices_of.items():
        if values[key] not in choices:
            raise UserError(f"{key} is {values[key]!r}, it must be one of {', '.join(choices)}")
    if model.hidden_size % model.num_heads:
        raise UserError(f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}")
    if train.global_batch % train.microbatches:
        raise UserError(
            f"train.global_batch {train.global_batch} is not divisible by train.microbatches {train.microbatches}"
        )
    if data.blanks.mask + data.blanks.gmask == 0:
        raise UserError("data.blanks.mask and data.blanks.gmask are both 0: give at least one a share")
    if data.seq_length < 16:
        raise UserError(f"data.seq_length is {data.seq_length}, it must be at least 16")
    if optimizer.clip_norm <= 0:
        raise UserError(f"optimizer.clip_norm is {optimizer.clip_norm}, it must be above 0")
    for name, keys in data.sources.items():
        if not keys.path and not keys.sample:
            raise UserError(f"data.sources.{name} has neither path nor sample: give it one")
        if keys.format not in FORMATS:
            raise UserError(f"data.sources.{name}.format is {keys.format!r}, it must be one of {', '.join(FORMATS)}")
        if keys.weight < 0:
            raise UserError(f"data.sources.{name}.weight is {keys.weight}, it must not be negative")


def to_json(config: Config) -> str:
    """Write a resolved config as the JSON of `config.json` in a workdir."""
    return json.dumps(config.to_dict(), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Config:
    """Read what `to_json` wrote, resolved again so that keys added since have their defaults."""
    return resolve(ConfigDict(json.loads(text)))


def original_glm(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, longest: int) -> Config:
    """Give what the sizes of the original GLM share: Pre-LN, tanh GELU, two learned position streams.

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
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    return config
