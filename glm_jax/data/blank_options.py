"""How blanks are drawn and rows are cut: the options, and the room that samples take, known before any is drawn."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from glm_jax.errors import UserError

# What a row is made of: three ways to blank a text, and prompts with answers.
OBJECTIVES = ("mask", "gmask", "smask", "instruction")

# A row reserves room for the spans it may draw; fewer than this share of draws need more and are drawn again.
OVERFLOW = 1e-3
# A whole document among others reserves less: what its neighbours leave free makes up for most draws that need more.
SHARED_OVERFLOW = 0.2


class SpecialTokens(Protocol):
    """The ids that blanks need; a `Tokenizer` has them."""

    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    eos: int
    pad: int


@dataclass(frozen=True)
class BlankOptions:
    """How blanks are drawn. The defaults follow the paper's text; what its code did beyond that is off.

    Attributes:
        mask_ratio: [MASK] spans are drawn until they hold at least int(mask_ratio * n) of n tokens.
        mean_span, longest_span: span lengths follow Poisson(mean_span) restricted to 1..longest_span.
        single_span_prob: probability that a [MASK] sample has just one span (0.02 in GLM-130B).
        short_seq_prob: probability that a [MASK] segment holds two shorter samples instead of one, cut at a uniform
            place (0.02 in GLM-130B, which dropped the second, as `cut_targets` does; else no text is lost).
        shortest_seq: where `short_seq_prob` and `cut_targets` cut, the first sample keeps at least this many tokens
            (32 in GLM-130B).
        gmask_min_ratio: a [gMASK] target is uniform on int(gmask_min_ratio * n)..n tokens.
        gmask_eop: a [gMASK] target ends in eop. GLM-130B's never did: it is off in experiments/glm_130b.py.
        gmask_infill_prob: probability that a [gMASK] blank lies anywhere and not at the end (original GLM: 0.5);
            text with a document's end inside keeps it at the end.
        smask_ratio: whole sentences are blanked until they hold at least this share.
        block_mask_prob: probability that an input token of a [MASK] target is replaced by `block_mask_token`
            (original GLM: 0.1, dBLOCK).
        two_streams: positions for learned_2d: all target tokens of any objective carry the position of their blank
            in stream 0 and 1, 2, ... in stream 1. Else one stream, in which [gMASK] and instruction positions go on
            counting.
        mask_segments, gmask_segments, smask_segments: samples packed into a row (GLM-130B: 4, 1).
        instruction_segments: instruction samples of a row, each cut to its even share (GLM-130B: 4).
        whole_documents: rows are packed with as many whole documents (or instruction samples) as they hold, so that
            none but those longer than a row is cut; the numbers of segments above then say nothing but how long an
            instruction sample may be.
        cut_targets: what GLM-130B's code did about room: 500 text tokens per 512 whatever the objective, and what
            of the [MASK] targets does not fit is cut (a third of them).
        replacement: each row's window is drawn at random, as GLM-130B's code did, so that an epoch misses some text
            and repeats some.
    """

    mask_ratio: float = 0.15
    mean_span: float = 3.0
    longest_span: int = 39
    single_span_prob: float = 0.0
    short_seq_prob: float = 0.0
    shortest_seq: int = 1
    gmask_min_ratio: float = 0.2
    gmask_eop: bool = True
    gmask_infill_prob: float = 0.0
    smask_ratio: float = 0.15
    block_mask_prob: float = 0.0
    block_mask_token: int = -1
    two_streams: bool = False
    mask_segments: int = 1
    gmask_segments: int = 1
    smask_segments: int = 1
    instruction_segments: int = 4
    whole_documents: bool = False
    cut_targets: bool = False
    replacement: bool = False

    def __post_init__(self) -> None:
        for name in ("single_span_prob", "short_seq_prob", "gmask_min_ratio", "gmask_infill_prob",
                     "block_mask_prob"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be from 0 to 1")
        for name in ("mask_ratio", "smask_ratio"):
            if not 0 < getattr(self, name) <= 0.5:
                raise UserError(f"{name} is {getattr(self, name)}, it must be above 0 and at most 0.5")
        for name in ("longest_span", "shortest_seq", "mask_segments", "gmask_segments", "smask_segments",
                     "instruction_segments"):  # fmt: skip
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.mean_span <= 0:
            raise UserError(f"mean_span is {self.mean_span}, it must be above 0")
        if self.block_mask_prob > 0 and self.block_mask_token < 0:
            raise UserError("block_mask_prob is set: give the id of dBLOCK as block_mask_token")
        if self.whole_documents and (self.cut_targets or self.replacement):
            raise UserError("whole_documents does not go with cut_targets or replacement: turn one of them off")

    @classmethod
    def from_section(cls, section: Mapping[str, Any], two_streams: bool = False) -> BlankOptions:
        """Read the options from the config's section `data.blanks`.

        Args:
            section: has every field but `two_streams`; its other keys are the objectives' shares.
            two_streams: whether the model has two position streams (model.position is learned_2d).

        Raises:
            UserError: a value out of range.
        """
        names = [field.name for field in dataclasses.fields(cls) if field.name != "two_streams"]
        try:
            return cls(**{name: section[name] for name in names}, two_streams=two_streams)
        except UserError as error:
            raise UserError(f"data.blanks: {error}") from None

    def segments(self, objective: str) -> int:
        """Give the number of samples that share a row of `objective`."""
        return getattr(self, f"{objective}_segments")


@functools.lru_cache
def span_distribution(mean: float, longest: int) -> np.ndarray:
    """Give P(length = 1), ..., P(length = longest) of Poisson(mean) kept to 1..longest: float64 [longest]."""
    lengths = np.arange(1, longest + 1)
    log_weights = lengths * np.log(mean) - np.cumsum(np.log(lengths))
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


def masked_tokens(length: int, options: BlankOptions) -> int:
    """Give how many of `length` tokens the [MASK] spans of a text must hold at least."""
    return max(1, int(options.mask_ratio * length))


def _span_sums(target: int, most: int, options: BlankOptions) -> list[np.ndarray]:
    """Give, for m = 0..most, the distribution of the sum of m span lengths below `target`: float64 [target].

    m + 1 spans are needed when the first m hold fewer tokens than the ratio asks for, and the distribution of
    their sum is an m-fold convolution.
    """
    pmf = np.concatenate([[0.0], span_distribution(options.mean_span, options.longest_span)])
    sums = np.zeros(target)
    sums[0] = 1.0
    table = [sums]
    for _ in range(most):
        table.append(np.convolve(table[-1], pmf)[:target])
    return table


def overflow_probability(length: int, room: int, options: BlankOptions) -> float:
    """Give the exact probability that a [MASK] draw over `length` tokens makes a sample longer than `room`.

    A sample takes length + 2 * spans places: each span costs its [MASK] and its sop.
    """
    target = masked_tokens(length, options)
    most = (room - length) // 2
    if most < 0:
        return 1.0
    return float(_span_sums(target, most, options)[-1].sum())


@functools.lru_cache
def text_length(objective: str, room: int, options: BlankOptions) -> int:
    """Give the number of text tokens that one sample of `objective` takes when it may fill `room` places.

    Fixed by (objective, room, options), so that a stream can be cut into windows before anything is drawn.

    Raises:
        UserError: `room` is too small for a sample.
    """
    if options.cut_targets:
        length = room * 500 // 512
    elif objective == "gmask":
        length = room - 2 if options.gmask_eop else room - 1
    else:  # a [MASK] sample; [sMASK] has fewer blanks and takes the same
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
    """Give the places that a text of n = 0..longest tokens reserves in a row of whole documents: int64 [longest + 1].

    A [MASK] text outgrows them with probability SHARED_OVERFLOW; none needs fewer than n + 2.
    """
    lengths = np.arange(longest + 1)
    if objective == "gmask":
        return lengths + (2 if options.gmask_eop else 1)
    targets = np.maximum(1, (options.mask_ratio * lengths).astype(np.int64))
    spans = np.zeros(longest + 1, np.int64)
    for m, sums in enumerate(_span_sums(int(targets[-1]), int(targets[-1]), options)):
        needs_more = np.cumsum(sums)[targets - 1]  # probability that the first m spans hold too little
        spans[(spans == 0) & (needs_more <= SHARED_OVERFLOW)] = m
    return lengths + 2 * spans
