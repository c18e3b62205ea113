"""Blank infilling: from a run of text tokens to a sample, a pure function of (tokens, generator, options).

A sample is a context (part A: the text with blanks, seen from both sides) and a target (part B: what stood in
the blanks, predicted left to right). Three objectives, told apart by the token that marks a blank:

- `mask`, [MASK]: many short spans, 15% of the text, for understanding;
- `gmask`, [gMASK]: one long blank at the end, for generation;
- `smask`, [sMASK]: whole sentences, 15% of the text.

Sources: GLM (arXiv 2103.10360, section 2) for the objective, GLM-130B (arXiv 2210.02414, section 2.2) for the
shares and lengths. An end-of-document token inside the text is ordinary text: it may be blanked and
predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from glm_jax.errors import UserError

OBJECTIVES = ("mask", "gmask", "smask")

# A row reserves room for the spans it may draw; fewer than this share of draws need more and are drawn again.
OVERFLOW = 1e-3

SENTENCE_ENDS = frozenset(".?!;:。？！；：…\n")


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
        short_seq_prob: probability that a [MASK] segment holds two shorter samples instead of one, cut at a
            uniform place (0.02 in GLM-130B, which dropped the second, as `cut_targets` does; else no text is
            lost).
        gmask_min_ratio: a [gMASK] target is uniform on int(gmask_min_ratio * n)..n tokens.
        gmask_eop: a [gMASK] target ends in eop. GLM-130B's never did: it is off in experiments/glm_130b.py.
        gmask_infill_prob: probability that a [gMASK] blank lies anywhere and not at the end (original GLM:
            0.5); text with a document's end inside keeps it at the end.
        smask_ratio: whole sentences are blanked until they hold at least this share.
        block_mask_prob: probability that an input token of a [MASK] target is replaced by `block_mask_token`
            (original GLM: 0.1, dBLOCK).
        two_streams: positions for learned_2d: all target tokens of any objective carry the position of their
            blank in stream 0 and 1, 2, ... in stream 1. Else one stream, in which [gMASK] positions go on
            counting.
        mask_segments, gmask_segments, smask_segments: samples packed into a row (GLM-130B: 4, 1).
        cut_targets: what GLM-130B's code did about room: 500 text tokens per 512 whatever the objective, and
            what of the [MASK] targets does not fit is cut (a third of them).
    """

    mask_ratio: float = 0.15
    mean_span: float = 3.0
    longest_span: int = 39
    single_span_prob: float = 0.0
    short_seq_prob: float = 0.0
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
    cut_targets: bool = False

    def __post_init__(self) -> None:
        for name in ("single_span_prob", "short_seq_prob", "gmask_min_ratio", "gmask_infill_prob",
                     "block_mask_prob"):  # fmt: skip
            if not 0 <= getattr(self, name) <= 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be from 0 to 1")
        for name in ("mask_ratio", "smask_ratio"):
            if not 0 < getattr(self, name) <= 0.5:
                raise UserError(f"{name} is {getattr(self, name)}, it must be above 0 and at most 0.5")
        for name in ("longest_span", "mask_segments", "gmask_segments", "smask_segments"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, it must be at least 1")
        if self.mean_span <= 0:
            raise UserError(f"mean_span is {self.mean_span}, it must be above 0")
        if self.block_mask_prob > 0 and self.block_mask_token < 0:
            raise UserError("block_mask_prob is set: give the id of dBLOCK as block_mask_token")

    def segments(self, objective: str) -> int:
        """Give the number of samples that share a row of `objective`."""
        return getattr(self, f"{objective}_segments")


class Sample(NamedTuple):
    """One sample of S tokens: `context` tokens of context, then target tokens, each of which is predicted.

    Attributes:
        tokens: int32 [S], what the model reads.
        targets: int32 [S], the token to predict at each place; in the context the token itself, without
        meaning.
        positions: int32 [S], place in the text with blanks; see `BlankOptions.two_streams` for target tokens.
        block_positions: int32 [S], 0 in the context and 1, 2, ... inside each target block.
        context: number of context tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    block_positions: np.ndarray
    context: int

    def __len__(self) -> int:
        """Give S."""
        return len(self.tokens)


@functools.lru_cache
def span_distribution(mean: float, longest: int) -> np.ndarray:
    """Give P(length = 1), ..., P(length = longest) of Poisson(mean) kept to 1..longest: float64 [longest]."""
    lengths = np.arange(1, longest + 1)
    log_weights = lengths * np.log(mean) - np.cumsum(np.log(lengths))
    weights = np.exp(log_weights - log_weights.max())
    return weights / weights.sum()


@functools.lru_cache
def _cumulative(mean: float, longest: int) -> np.ndarray:
    return np.cumsum(span_distribution(mean, longest))


def overflow_probability(length: int, room: int, options: BlankOptions) -> float:
    """Give the exact probability that a [MASK] draw over `length` tokens makes a sample longer than `room`.

    A sample takes length + 2 * spans places: each span costs its [MASK] and its sop. m + 1 spans are needed
    when the first m hold fewer tokens than the ratio asks for, and the distribution of their sum is an m-fold
    convolution.
    """
    target = max(1, int(options.mask_ratio * length))
    most = (room - length) // 2
    if most < 0:
        return 1.0
    pmf = np.concatenate([[0.0], span_distribution(options.mean_span, options.longest_span)])
    sums = np.zeros(target)  # P(sum of the spans so far = s), for s below the target
    sums[0] = 1.0
    for _ in range(most):
        sums = np.convolve(sums, pmf)[:target]
    return float(sums.sum())


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


def draw_lengths(length: int, generator: np.random.Generator, options: BlankOptions) -> np.ndarray:
    """Draw span lengths, in drawn order, until they hold int(mask_ratio * length) tokens: int64 [spans].

    No span is longer than half the text, which only texts of a few dozen tokens can notice.
    """
    target = max(1, int(options.mask_ratio * length))
    single = options.single_span_prob > 0 and generator.random() < options.single_span_prob
    draws = generator.random(1 if single else target)
    lengths = np.searchsorted(_cumulative(options.mean_span, options.longest_span), draws, side="right") + 1
    lengths = np.minimum(lengths, min(max(1, length // 2), options.longest_span))
    return lengths[: np.searchsorted(np.cumsum(lengths), target) + 1]


def place_spans(lengths: np.ndarray, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place spans of `lengths` in a text, at least one token between them.

    The unmasked tokens that need not stand between spans are shared out by sorted uniform draws.

    Returns:
        (starts, lengths), both int64 [spans], in the order of the text.
    """
    lengths = generator.permutation(lengths)  # the last one drawn is longer than the others on average
    slack = length - int(lengths.sum()) - len(lengths) + 1
    starts = np.sort(generator.integers(0, slack + 1, len(lengths)))
    starts[1:] += np.cumsum(lengths[:-1] + 1)
    return starts, lengths


def blank_spans(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray, blank: int,
    special: SpecialTokens, two_streams: bool = False, *, end: bool = True, count_on: bool = False,
) -> Sample:  # fmt: skip
    """Assemble the sample in which the given spans of `tokens` are blanks.

    Args:
        tokens: int32 [n], the text.
        starts, lengths: int [spans], disjoint spans in the order of the text.
        order: int [spans], the order of the target blocks.
        blank: the id that stands for a span in the context.
        special: ids of sop and eop.
        two_streams: targets repeat their blank's position even where `count_on` says otherwise.
        end: each block predicts eop after its span.
        count_on: target positions go on counting after the context ([gMASK]); else they repeat their blank's.

    Returns:
        A Sample of n + 2 * spans tokens (one fewer a span without `end`).
    """
    n, spans = len(tokens), len(starts)
    shortened = np.cumsum(lengths - 1)  # by how much the context is shorter than the text, after each span
    context = n - int(shortened[-1])
    kept = np.ones(n, bool)
    blocks = lengths[order]
    ends = np.cumsum(blocks)
    inner = np.arange(ends[-1]) - np.repeat(ends - blocks, blocks)  # place inside the span
    covered = np.repeat(starts[order], blocks) + inner  # text index of each target token, block after block
    kept[covered] = False
    kept[starts] = True
    blank_positions = starts - shortened + (lengths - 1)

    sample = np.empty((4, context + len(covered) + (spans if end else 0)), np.int32)
    read, predicted, positions, block_positions = sample
    marked = tokens.copy()
    marked[starts] = blank
    read[:context] = predicted[:context] = marked[kept]
    positions[:context] = np.arange(context)
    block_positions[:context] = 0

    extra = 1 if end else 0
    place = context + np.arange(len(covered)) + extra * np.repeat(np.arange(spans), blocks)  # [covered]
    predicted[place] = tokens[covered]
    heads = context + ends - blocks + extra * np.arange(spans)  # where each block begins
    read[context + 1 :] = predicted[context:-1]
    read[heads] = special.sop
    if end:
        predicted[heads + blocks] = special.eop
    width = blocks + extra
    if count_on and not two_streams:
        positions[context:] = np.arange(context, sample.shape[1])
    else:
        positions[context:] = np.repeat(blank_positions[order], width)
    block_positions[context:] = np.arange(1, len(read) - context + 1) - np.repeat(heads - context, width)
    return Sample(read, predicted, positions, block_positions, context)


def mask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions,
    room: int | None = None,
) -> Sample:  # fmt: skip
    """Blank random spans of `tokens` (int32 [n], n >= 1) as [MASK].

    A draw that does not fit `room` places is drawn again (`text_length` keeps that below one in a thousand;
    longer draws have more and so shorter spans, which the redraw disfavours by as little). With `cut_targets`
    it is cut.

    Raises:
        ValueError: more tokens than `text_length` allows for `room`.
    """
    n = len(tokens)
    lengths = draw_lengths(n, generator, options)
    while room is not None and not options.cut_targets and n + 2 * len(lengths) > room:
        if n > text_length("mask", room, options):
            raise ValueError(f"{n} text tokens and their spans do not fit {room} places")
        lengths = draw_lengths(n, generator, options)
    starts, lengths = place_spans(lengths, n, generator)
    order = generator.permutation(len(starts))
    sample = blank_spans(tokens, starts, lengths, order, special.mask, special, options.two_streams)
    if options.block_mask_prob > 0:
        inside = np.flatnonzero(sample.block_positions > 1)
        hidden = inside[generator.random(len(inside)) < options.block_mask_prob]
        sample.tokens[hidden] = options.block_mask_token
    if room is not None and len(sample) > room:
        cut = [array[:room] for array in sample[:4]]
        sample = Sample(cut[0], cut[1], cut[2], cut[3], min(sample.context, room))
    return sample


def gmask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions
) -> Sample:
    """Blank one long span of `tokens` (int32 [n], n >= 1) as [gMASK], at the end unless infilling."""
    n = len(tokens)
    length = max(1, int(generator.integers(int(options.gmask_min_ratio * n), n + 1)))
    start = n - length
    if options.gmask_infill_prob > 0:
        infill = generator.random() < options.gmask_infill_prob
        anywhere = int(generator.integers(0, start + 1))
        if infill and not (tokens[:-1] == special.eos).any():
            start = anywhere
    return blank_spans(
        tokens, np.array([start]), np.array([length]), np.array([0]), special.gmask, special,
        options.two_streams, end=options.gmask_eop, count_on=True,
    )  # fmt: skip


def smask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions,
    sentence_ends: np.ndarray, room: int | None = None,
) -> Sample:  # fmt: skip
    """Blank whole sentences of `tokens` (int32 [n], n >= 1) as [sMASK], in random order until the ratio is
    reached.

    Args:
        sentence_ends: bool [V], True for tokens that end a sentence; see `find_sentence_ends`.
        room: with many one-token sentences a sample could outgrow it; then fewer are blanked.
    """
    n = len(tokens)
    after = np.flatnonzero(sentence_ends[tokens[:-1]] | (tokens[:-1] == special.eos)) + 1
    starts = np.concatenate([[0], after])
    lengths = np.diff(starts, append=n)
    order = generator.permutation(len(starts))
    chosen = order[: np.searchsorted(np.cumsum(lengths[order]), options.smask_ratio * n) + 1]
    if room is not None:
        chosen = chosen[: max(1, (room - n) // 2)]
    in_text = np.sort(chosen)
    return blank_spans(
        tokens, starts[in_text], lengths[in_text], np.searchsorted(in_text, chosen), special.smask, special,
        options.two_streams,
    )  # fmt: skip


def find_sentence_ends(pieces: Sequence[str]) -> np.ndarray:
    """Give bool [V]: which of a vocabulary's pieces hold a mark that ends a sentence."""
    return np.array([not SENTENCE_ENDS.isdisjoint(piece) for piece in pieces], bool)


def make_samples(
    objective: str, tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens,
    options: BlankOptions, room: int, sentence_ends: np.ndarray | None = None,
) -> list[Sample]:  # fmt: skip
    """Make the samples of one segment: one, or two where `short_seq_prob` cuts a [MASK] text in two.

    Args:
        objective: one of OBJECTIVES.
        tokens: int32 [n], at most `text_length(objective, room, options)` of them.
        generator: drawn from in a fixed order, so that the samples are a function of its state.
        special, options: ids and settings.
        room: places in the row that the samples may fill together.
        sentence_ends: bool [V], for `smask`.

    Raises:
        UserError: `smask` without `sentence_ends`.
    """
    if objective == "gmask":
        return [gmask_sample(tokens, generator, special, options)]
    if objective == "smask":
        if sentence_ends is None:
            raise UserError("smask needs to know which tokens end a sentence: give sentence_ends")
        return [smask_sample(tokens, generator, special, options, sentence_ends, room)]
    if options.short_seq_prob > 0 and generator.random() < options.short_seq_prob and len(tokens) + 4 <= room:
        cut = int(generator.integers(1, len(tokens)))
        if options.cut_targets:
            return [mask_sample(tokens[:cut], generator, special, options, room)]
        while True:
            parts = [mask_sample(part, generator, special, options) for part in (tokens[:cut], tokens[cut:])]
            if sum(map(len, parts)) <= room:
                return parts
    return [mask_sample(tokens, generator, special, options, room)]
