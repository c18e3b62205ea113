"""`--config.KEY=VALUE`: the text of a flag becomes a value of its key's type."""

from __future__ import annotations

import ast
import typing
import warnings
from typing import Literal

from glm_jax.config import default_values, definition
from glm_jax.config.fields import Definition, closest, entry_type, is_section, names, shown
from glm_jax.errors import UserError

_TRUTH = {"true": True, "t": True, "1": True, "false": False, "f": False, "0": False}

# What other programs call some keys, by their last name.
_ELSEWHERE = {
    "lr": "optimizer.peak_lr",
    "learning_rate": "optimizer.peak_lr",
    "max_lr": "optimizer.peak_lr",
    "warmup": "optimizer.warmup_samples",
    "wd": "optimizer.weight_decay",
    "batch": "train.global_batch",
    "batch_size": "train.global_batch",
    "max_steps": "train.steps",
    "epochs": "train.steps",
    "layers": "model.num_layers",
    "heads": "model.num_heads",
    "dtype": "train.precision",
}


def is_switch(key: str) -> bool:
    """Whether a key is true or false, so that its flag needs no value."""
    found = definition(key)
    return found is not None and found.type is bool


def known_key(name: str) -> str | None:
    """Return the key that is meant by a name without its section, or by another program's name; None without any."""
    known = list(default_values({}))
    last = name.replace("-", "_").rpartition(".")[2]
    same = [key for key in known if key == name or key.rpartition(".")[2] == last]
    return same[0] if same else _ELSEWHERE.get(last)


def parse(key: str, text: str) -> object:
    """Return the value that `text` describes for a key.

    Raises:
        UserError: there is no such key, it is a section, or its values are of another type.
    """
    found = definition(key)
    if found is None:
        raise UserError(f"unknown config key {key}: {_suggestion(key)}")
    if is_section(found.type) or entry_type(found.type) is not None:
        kind = entry_type(found.type) or found.type
        table = "" if is_section(found.type) else "NAME."
        first = next(names(kind)) if is_section(kind) else ""
        raise UserError(f"{key} is a section: set its keys, such as --config.{key}.{table}{first}=VALUE")
    try:
        return _value(found, text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        raise UserError(f"{key} is {shown(text)}, it must be {_wanted(found)}") from None


def _value(found: Definition, text: str) -> object:
    kind = type(typing.get_args(found.type)[0]) if typing.get_origin(found.type) is Literal else found.type
    if kind is str:
        return text
    if kind is bool:
        if text.lower() not in _TRUTH:
            raise ValueError(text)
        return _TRUTH[text.lower()]
    if kind is int:
        return int(text)
    if kind is float:
        return float(text)
    with warnings.catch_warnings():  # of odd syntax: the value is checked as any other
        warnings.simplefilter("ignore")
        return ast.literal_eval(text)


def _wanted(found: Definition) -> str:
    if found.key.example is not None:
        return f"a tuple of entries such as {found.key.example!r}"
    if found.type is bool:
        return "true or false"
    whole = "a whole number" if found.type is int else "a number"
    return f"{whole} such as {found.default!r}" if found.type in (int, float) else f"a value such as {found.default!r}"


def _suggestion(key: str) -> str:
    """Return what `closest` finds among the keys that `key` may mean, with the names of its own entries."""
    section, _, rest = key.removeprefix("data.").partition(".")
    name = rest.partition(".")[0]
    entries = {section: [name]} if key.startswith("data.") and section in ("sources", "instructions") and name else {}
    known = list(default_values(entries))
    meant = known_key(key)
    return f"did you mean {meant}?" if meant and not entries else closest(key, known)
