"""What a user may ask of generation: a strategy and its options, and what comes back."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config.fields import Section, closest, convert, definitions, field, shown
from glm_jax.errors import UserError

Array = jax.Array

# Temperatures whose reciprocals are float32, too. Devices take denormal numbers for 0.
SMALLEST, LARGEST = float(jnp.finfo(jnp.float32).tiny), 1e30


@dataclasses.dataclass(frozen=True)
class Options(Section):
    """What every strategy takes.

    Raises:
        UserError: an option has another type, is not finite, or is out of range.
    """

    min_tokens: int = field(
        1,
        at_least=0,
        doc="end tokens are banned while a fill has fewer tokens; 1: no fill is empty, as in training; 0: it may be",
    )
    repetition_penalty: float = field(
        1.0,
        at_least=0.01,
        at_most=100.0,
        doc="divides positive logits of tokens in the context or the fill, multiplies negative ones; 1 disables",
    )
    bias: tuple[tuple[int, float], ...] = field(
        (), at_least=-1000, at_most=1000, example=(17, -2.5), doc="tokens, and what is added to their logits"
    )
    banned: tuple[int, ...] = field((), at_least=0, example=17, doc="tokens that are never generated")

    def __post_init__(self) -> None:
        for name, kind, default, key in definitions(type(self)):
            value = getattr(self, name)
            value = value.item() if isinstance(value, np.generic) else value
            object.__setattr__(self, name, convert(name, value, kind, key, default))
        try:
            super().__post_init__()
        except ValueError as error:
            raise UserError(str(error)) from None


@dataclasses.dataclass(frozen=True)
class Greedy(Options):
    """The most likely token, every time."""


@dataclasses.dataclass(frozen=True)
class Sample(Options):
    """Sampling after temperature, top-k and top-p, applied in this order."""

    temperature: float = field(1.0, at_least=0, doc="divides the logits; 0 is greedy")
    top_k: int = field(0, at_least=0, doc="sample from this many of the likeliest tokens; 0 keeps all")
    top_p: float = field(
        1.0,
        at_least=0,
        at_most=1,
        doc="sample from the likeliest tokens with this much probability in all; 1 keeps all, 0 only the likeliest",
    )


@dataclasses.dataclass(frozen=True)
class Beam(Options):
    """Beam search by the rules of the released GLM-130B (see `glm_jax.inference.beams`)."""

    count: int = field(4, at_least=1, at_most=256, doc="beams of a prompt, and fills that come back")
    length_penalty: float = field(
        1.0,
        at_least=-10,
        at_most=10,
        doc="a finished beam scores its log-probability over ((5 + length) / 6) to this power; "
        "length counts the context, too",
    )
    no_repeat_ngram: int = field(
        0, at_least=0, at_most=64, doc="no beam repeats a run of this many tokens that it has generated; 0 disables"
    )
    deterministic: bool = field(True, doc="False draws the continuations of beams instead of taking the best")


KINDS: dict[str, type[Options]] = {"greedy": Greedy, "sample": Sample, "beam": Beam}


def named(name: str, **options: object) -> Options:
    """Return the strategy of this name ("greedy", "sample" or "beam") with options as in `KINDS`.

    Raises:
        UserError: the strategy or an option is unknown, or a value is not allowed.
    """
    if name not in KINDS:
        raise UserError(f"unknown strategy {shown(name)}: choose one of {', '.join(KINDS)}")
    known = {kind: [one.name for one in definitions(KINDS[kind])] for kind in KINDS}
    for option in options:
        if option not in known[name]:
            others = [kind for kind in KINDS if option in known[kind]]
            hint = f"it is one of {' and '.join(others)}" if others else closest(option, known[name], "generate --help")
            raise UserError(f"strategy {name} has no option {option}: {hint}")
    return KINDS[name](**options)  # pyright: ignore[reportArgumentType] (values are checked as they arrive)


def row_key(*parts: object) -> np.ndarray:
    """Return the key that follows from what a row is, for `Request`: uint32 [2]."""
    return np.frombuffer(hashlib.sha256(" ".join(map(str, parts)).encode()).digest()[:8], "<u4")


class Request(NamedTuple):
    """One fill to generate."""

    context: Sequence[int]  # with the mask and sop
    limit: int  # the largest number of tokens to generate, an end token included; 0: none, a row of padding
    options: Options = Greedy()
    key: Sequence[int] | np.ndarray = (0, 0)  # raw data of a threefry key, uint32 [2]
    banned_starts: Sequence[Sequence[int]] = ()  # what the fill does not begin with


class Generated(NamedTuple):
    """A generated sequence."""

    tokens: list[int]  # without the context; an end token, if one came, is the last
    log_probabilities: list[float]  # the model's own, of each token
    score: float  # of beams, with the length penalty; else the sum of the log-probabilities
    ended: bool  # by an end token, not by the limit
