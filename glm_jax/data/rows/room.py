"""How much room samples take in a row, computed before any blank is drawn."""

from __future__ import annotations

import functools
from typing import Protocol

import numpy as np

from glm_jax.config.data import BlankOptions
from glm_jax.errors import UserError

# A row reserves room for the spans it may draw. Less than this share of draws need more, and are repeated.
OVERFLOW = 1e-3
# A whole document among others reserves less: room its neighbours leave free suffices for most draws that need more.
SHARED_OVERFLOW = 0.2


class SpecialTokens(Protocol):
    """The token ids that blanks need; a `Tokenizer` has them. `prefix` stands before each context."""

    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    eos: int
    pad: int
    prefix: tuple[int, ...]


@functools.lru_cache
def span_distribution(mean: float, longest: int) -> np.ndarray:
    """Return P(length = 1), ..., P(length = longest) of Poisson(mean) restricted to 1..longest: float64 [longest]."""
    lengths = np.arange(1, longest + 1)
    log_weights = lengths * np.log(mean) - np.cumsum(np.log(lengths))
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def masked_tokens(length: int, options: BlankOptions) -> int:
    """Return the least number of `length` tokens that the [MASK] spans of a text must hold."""
    return max(1, int(options.mask_ratio * length))


def _span_sums(target: int, most: int, options: BlankOptions) -> list[np.ndarray]:
    """Return, for m = 0..most, the distribution of the sum of m span lengths below `target`: float64 [target].

    A draw needs more than m spans if the first m hold fewer than `target` tokens. The distribution of their sum is an
    m-fold convolution.
    """
    pmf = np.concatenate([[0.0], span_distribution(options.mean_span, options.longest_span)])
    sums = np.zeros(target)
    sums[0] = 1.0
    table = [sums]
    for _ in range(most):
        table.append(np.convolve(table[-1], pmf)[:target])
    return table


def overflow_probability(length: int, room: int, options: BlankOptions) -> float:
    """Return the exact probability that a [MASK] draw over `length` tokens makes a sample longer than `room`.

    A sample takes length + 2 * spans places: each span adds its [MASK] and its sop.
    """
    target = masked_tokens(length, options)
    most = (room - length) // 2
    if most < 0:
        return 1.0
    return float(_span_sums(target, most, options)[-1].sum())


@functools.lru_cache
def text_length(objective: str, room: int, options: BlankOptions) -> int:
    """Return the number of text tokens in one sample of `objective` that may fill `room` places.

    It depends only on the arguments, so a stream can be cut into windows before anything is drawn.

    Raises:
        UserError: `room` is too small for a sample.
    """
    if options.cut_targets:
        length = room * 500 // 512
    elif objective == "gmask":
        length = room - _added_to_gmask(options)
    else:  # a [MASK] sample; [sMASK] has fewer blanks and takes as much text
        low, high = 0, room
        while high - low > 1:
            middle = (low + high) // 2
            if overflow_probability(middle, room, options) <= OVERFLOW:
                low = middle
            else:
                high = middle
        length = low
    if length < 4:
        raise UserError(f"{objective} samples do not fit {room} tokens: raise data.seq_length or lower its segments")
    return length


@functools.lru_cache
def places(objective: str, longest: int, options: BlankOptions) -> np.ndarray:
    """Return the places that a text of n = 0..longest tokens reserves in a row of whole documents: int64 [longest + 1].

    A [MASK] text exceeds them with probability SHARED_OVERFLOW. None reserves fewer than n + 2.
    """
    lengths = np.arange(longest + 1)
    if objective == "gmask":
        return lengths + _added_to_gmask(options)
    targets = np.maximum(1, (options.mask_ratio * lengths).astype(np.int64))
    spans = np.zeros(longest + 1, np.int64)
    for m, sums in enumerate(_span_sums(int(targets[-1]), int(targets[-1]), options)):
        needs_more = np.cumsum(sums)[targets - 1]  # probability that the first m spans hold too few tokens
        spans[(spans == 0) & (needs_more <= SHARED_OVERFLOW)] = m
    return lengths + 2 * spans


def _added_to_gmask(options: BlankOptions) -> int:
    """Return how many places a [gMASK] sample may take beyond its text's: for the blank, and for eop."""
    return 2 if options.gmask_eop or options.gmask_infill_prob > 0 else 1
