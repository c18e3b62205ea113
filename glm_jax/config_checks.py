"""Checks of configuration values: every slip becomes one line that says which key, what is wrong and how to mend it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from glm_jax.errors import UserError

NORMS = ("deepnorm", "post", "pre", "sandwich")
POSITIONS = ("rope", "alibi", "learned_2d")
ACTIVATIONS = ("geglu", "gelu", "gelu_tanh")
ROPE_ANGLES = ("float32", "float16")
INITIALISATIONS = ("xavier", "normal", "largescale")
SCHEDULES = ("1f1b", "gpipe")
STASHES = ("layer", "stage", "all")
ZEROS = (1, 3)
LOSS_NORMALIZATIONS = ("tokens", "microbatch")
FORMATS = ("text", "jsonl", "jsonl.zst", "json", "parquet")
NORMALISATIONS = ("nfc", "nfkc", "newlines")
PRECISIONS = ("float32", "bfloat16", "float16")

# What the keys that hold tuples take: pairs like the example, or so many whole numbers.
TUPLES: dict[str, tuple[int, Any] | int] = {
    "data.weights": (0, {"name": 1.0}),
    "data.blanks.history": (0, {"name": 1.0}),
    "train.embedding_shrink.history": (6000, 0.1),
    "train.skip_steps": (40_701, 40_900),
    "train.batch_ramp": 3,
    "train.profile": 2,
    "optimizer.rewarm": (22_800, 500),
    "interventions": (33_600, {"train.embedding_shrink.alpha": 0.5}),
}


def flatten(config: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) for every leaf, in order."""
    for key, value in config.items():
        if isinstance(value, Mapping | ConfigDict):
            yield from flatten(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def convert(key: str, value: Any, default: Any) -> Any:
    """Return `value` in the type of `default`; an int may stand for a float, and a list for a tuple.

    Raises:
        UserError: it is of another type.
    """
    if isinstance(default, tuple) and isinstance(value, list | tuple):
        return _convert_tuple(key, value)
    if isinstance(default, float) and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if type(value) is not type(default):
        raise UserError(f"{key} is {value!r}, it must be of type {type(default).__name__} (such as {default!r})")
    return value


def _convert_tuple(key: str, value: list | tuple) -> tuple:
    """Check a tuple's entries against the key's example, as they come from a file, a flag or from JSON."""
    example = TUPLES[key]
    if not isinstance(example, tuple):  # a flat tuple, all of it or nothing
        if value and (len(value) != example or any(type(entry) is not int for entry in value)):
            raise UserError(f"{key} is {value!r}, it must hold {example} whole numbers, or nothing")
        return tuple(value)
    return tuple(_convert_pair(key, entry, example) for entry in value)


def _convert_pair(key: str, entry: Any, example: tuple[Any, Any]) -> tuple[int, Any]:
    pair = isinstance(entry, list | tuple) and len(entry) == 2 and type(entry[0]) is int
    named = pair and isinstance(entry[1], Mapping | ConfigDict) and all(isinstance(name, str) for name in entry[1])
    if named and isinstance(example[1], dict):
        weights = key != "interventions"
        return entry[0], {
            name: convert(f"{key} of {name}", inner, 0.0) if weights else inner for name, inner in entry[1].items()
        }
    if pair and not isinstance(example[1], dict) and type(entry[1]) in (int, type(example[1])):
        return entry[0], type(example[1])(entry[1])
    raise UserError(f"{key} holds {entry!r}: its entries are pairs such as {example!r}")


def check(config: Any) -> None:
    """Check what can be checked without data and devices.

    Raises:
        UserError: a value out of range, or values that do not go together.
    """
    _check_values(dict(flatten(config)))
    model, data, train, optimizer = config.model, config.data, config.train, config.optimizer
    if not 0 <= config.seed < 1 << 63:
        raise UserError(f"seed is {config.seed}, it must be from 0 to 2**63 - 1")
    if model.hidden_size % model.num_heads:
        raise UserError(f"model.hidden_size {model.hidden_size} is not divisible by model.num_heads {model.num_heads}")
    head_dim = model.hidden_size // model.num_heads
    if model.position == "rope" and head_dim % 2:
        raise UserError(f"model.hidden_size / model.num_heads is {head_dim}: rotary positions need it to be even")
    if model.position == "learned_2d" and 0 < model.max_length < data.seq_length:
        raise UserError(
            f"model.max_length {model.max_length} is less than data.seq_length {data.seq_length}: "
            "raise it, or set it to 0"
        )
    if train.global_batch % train.microbatches:
        raise UserError(
            f"train.global_batch {train.global_batch} is not divisible by train.microbatches {train.microbatches}"
        )
    if data.blanks.mask + data.blanks.gmask + data.blanks.smask + data.blanks.instruction == 0:
        raise UserError("data.blanks.mask, gmask, smask and instruction are all 0: give at least one a share")
    if data.seq_length < 16:
        raise UserError(f"data.seq_length is {data.seq_length}, it must be at least 16")
    _check_entries(data)
    _check_recipe(train, optimizer, config.mesh)


def _check_values(values: Mapping[str, Any]) -> None:
    """Check each key for itself: its range, or that it is one of its choices."""
    positive = ("model.num_layers", "model.hidden_size", "model.num_heads", "model.ffn_size", "model.vocab_multiple",
                "data.seq_length", "data.tokenizer.vocab_size", "train.steps", "train.global_batch",
                "train.microbatches", "train.log_every", "train.eval_rows", "train.save_every",
                "train.keep", "train.spike.window", "train.loss_scale.window",
                "train.loss_scale.hysteresis")  # fmt: skip
    for key in positive:
        if values[key] < 1:
            raise UserError(f"{key} is {values[key]}, it must be at least 1")
    for key in ("model.vocab_size", "model.max_length",
                "train.eval_every", "train.keep_every", "train.save_minutes", "train.spike.rollbacks",
                "optimizer.warmup_samples", "optimizer.decay_samples", "optimizer.weight_decay", "data.temperature",
                "data.blanks.mask", "data.blanks.gmask", "data.blanks.smask", "data.blanks.instruction"):  # fmt: skip
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
        "mesh.zero": ZEROS,
        "train.loss_normalization": LOSS_NORMALIZATIONS,
        "pipeline.schedule": SCHEDULES,
        "pipeline.stash": STASHES,
    }
    for key, choices in choices_of.items():
        if values[key] not in choices:
            raise UserError(f"{key} is {values[key]!r}, it must be one of {', '.join(map(str, choices))}")


def _check_entries(data: Any) -> None:
    """Check the sources and the instructions."""
    for name, keys in data.sources.items():
        if not keys.path and not keys.sample:
            raise UserError(f"data.sources.{name} has neither path nor sample: give it one")
        if keys.format not in FORMATS:
            raise UserError(f"data.sources.{name}.format is {keys.format!r}, it must be one of {', '.join(FORMATS)}")
        for option in filter(None, map(str.strip, keys.normalise.split(","))):
            if option not in NORMALISATIONS:
                known = ", ".join(NORMALISATIONS)
                raise UserError(f"data.sources.{name}.normalise has {option!r}, it takes any of {known}")
        if keys.weight < 0:
            raise UserError(f"data.sources.{name}.weight is {keys.weight}, it must not be negative")
    for name, keys in data.instructions.items():
        if not keys.path and not keys.sample:
            raise UserError(f"data.instructions.{name} has neither path nor sample: give it one")
        if keys.weight < 0 or keys.cap < 0:
            raise UserError(f"data.instructions.{name} has a negative weight or cap: 0 stands for the default")


def _check_recipe(train: Any, optimizer: Any, mesh: Any) -> None:
    """Check the schedules and the operator's tools."""
    shrink = train.embedding_shrink
    for alpha in (shrink.alpha, *(alpha for _, alpha in shrink.history)):
        if not 0 <= alpha <= 1:
            raise UserError(f"train.embedding_shrink holds alpha {alpha}, it must be from 0 to 1")
    for (before, _), (after, _) in zip(shrink.history, shrink.history[1:], strict=False):
        if after <= before:
            raise UserError(f"train.embedding_shrink.history names step {after} after {before}: put them in order")
    for first, last in train.skip_steps:
        if not 1 <= first <= last:
            raise UserError(f"train.skip_steps holds ({first}, {last}): steps count from 1, the first comes first")
    if train.profile and not 1 <= train.profile[0] <= train.profile[1]:
        raise UserError(f"train.profile is {train.profile}: steps count from 1, the first comes first")
    for first, steps in optimizer.rewarm:
        if first < 0 or steps < 1:
            raise UserError(f"optimizer.rewarm holds ({first}, {steps}): give the step it begins at, and how many")
    for key, value in (
        ("optimizer.clip_norm", optimizer.clip_norm),
        ("train.spike.deviations", train.spike.deviations),
        ("train.loss_scale.initial", train.loss_scale.initial),
        ("train.loss_scale.minimum", train.loss_scale.minimum),
        ("mesh.collective_timeout", mesh.collective_timeout),
    ):
        if value <= 0:
            raise UserError(f"{key} is {value}, it must be above 0")
    if train.batch_ramp:
        start, increment, samples = train.batch_ramp
        rows = train.global_batch // train.microbatches
        for name, value in (("first batch", start), ("increment", increment)):
            if value < 1 or value % rows:
                raise UserError(
                    f"train.batch_ramp has the {name} {value}: it must be a multiple of the {rows} rows of a "
                    "microbatch (train.global_batch / train.microbatches)"
                )
        if start > train.global_batch or (train.global_batch - start) % increment or samples < 1:
            raise UserError(
                f"train.batch_ramp {train.batch_ramp} does not reach train.global_batch {train.global_batch}: from the "
                "first batch, by whole increments, over a number of samples"
            )
