"""Blank infilling: from a run of text tokens to a sample, a pure function of (tokens, generator, options).

A sample is a context (part A: the text with blanks, visible in both directions) and a target (part B: what the blanks
replaced, predicted left to right). There are three objectives, each with its own token for a blank, and prompts:

- `mask`, [MASK]: many short spans, 15% of the text, for understanding;
- `gmask`, [gMASK]: one long blank at the end, for generation;
- `smask`, [sMASK]: whole sentences, 15% of the text;
- `instruction`: a prompt, then [MASK] or [gMASK], whose target is the answer (prompts.py).

Sources: GLM (arXiv 2103.10360, section 2) for the objective, GLM-130B (arXiv 2210.02414, section 2.2) for the shares
and lengths. An end-of-document token inside the text is ordinary text: it may be blanked and predicted.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.config.data import BlankOptions
from glm_jax.data.rows.room import SpecialTokens, masked_tokens, places, span_distribution
from glm_jax.errors import UserError

SENTENCE_ENDS = frozenset(".?!;:。？！；：…\n")


class Sample(NamedTuple):
    """One sample of S tokens: `context` tokens of context, then target tokens, each of which is predicted.

    Attributes:
        tokens: int32 [S], what the model reads.
        targets: int32 [S], the token to predict at each place. In the context it is the token itself and means nothing.
        positions: int32 [S], the place in the text with blanks; see `BlankOptions.two_streams` for target tokens.
        block_positions: int32 [S], 0 in the context and 1, 2, ... inside each target block.
        context: number of context tokens.
    """

    tokens: np.ndarray
    targets: np.ndarray
    positions: np.ndarray
    block_positions: np.ndarray
    context: int

    def __len__(self) -> int:
        """Return S."""
        return len(self.tokens)


@functools.lru_cache
def _cumulative(mean: float, longest: int) -> np.ndarray:
    return np.cumsum(span_distribution(mean, longest))


def draw_lengths(length: int, generator: np.random.Generator, options: BlankOptions) -> np.ndarray:
    """Draw span lengths until they hold int(mask_ratio * length) tokens: int64 [spans], in the order drawn.

    No span is longer than half the text. The last one is cut if needed to leave a token between any two spans, which
    only happens in texts of a few dozen tokens.
    """
    target = masked_tokens(length, options)
    single = options.single_span_prob > 0 and generator.random() < options.single_span_prob
    draws = generator.random(1 if single else target)
    lengths = np.searchsorted(_cumulative(options.mean_span, options.longest_span), draws, side="right") + 1
    lengths = np.minimum(lengths, min(max(1, length // 2), options.longest_span))
    lengths = lengths[: np.searchsorted(np.cumsum(lengths), target) + 1]
    lengths[-1] -= max(0, int(lengths.sum()) + len(lengths) - 1 - length)
    return lengths


def place_spans(lengths: np.ndarray, length: int, generator: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Place spans of `lengths` in a text, with at least one token between them.

    Sorted uniform draws distribute the unmasked tokens that are not needed between spans.

    Returns:
        (starts, lengths), both int64 [spans], in the order of the text.
    """
    lengths = generator.permutation(lengths)  # the span drawn last is longer than the others on average
    slack = length - int(lengths.sum()) - len(lengths) + 1
    starts = np.sort(generator.integers(0, slack + 1, len(lengths)))
    starts[1:] += np.cumsum(lengths[:-1] + 1)
    return starts, lengths


def sample_positions(
    context: int, blanks: np.ndarray, widths: np.ndarray, *, repeat: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Return the positions of a sample: int32 [S], and the places inside target blocks, int32 [S].

    The context counts from 0. Each target block repeats its blank's position, or all continue the context's count. The
    second stream, read by models with two streams, is 0 in the context and 1, 2, ... in each block.

    Args:
        context: tokens of context.
        blanks: int [blocks], the place of each block's blank in the context.
        widths: int [blocks], the tokens of each block, in the order of the blocks.
        repeat: whether blocks repeat their blank's position. In training, those of [MASK] and [sMASK] do, and all do
            with two streams; in inference, those of [MASK] and [sMASK] do.
    """
    ends = widths.cumsum()
    positions = np.arange(context + ends[-1], dtype=np.int32)
    inside = np.zeros_like(positions)
    inside[context:] = np.arange(1, ends[-1] + 1) - (ends - widths).repeat(widths)
    if repeat:
        positions[context:] = blanks.repeat(widths)
    return positions, inside


def blank_spans(
    tokens: np.ndarray, starts: np.ndarray, lengths: np.ndarray, order: np.ndarray, blank: int, special: SpecialTokens
) -> Sample:
    """Return the sample in which the given spans of `tokens` are blanks.

    Each target block reads sop and its span, predicts the span and eop, and repeats its blank's position.

    Args:
        tokens: int32 [n], the text.
        starts, lengths: int [spans], disjoint spans in the order of the text.
        order: int [spans], the order of the target blocks.
        blank: the id that stands for a span in the context.
        special: ids of sop and eop.

    Returns:
        A Sample of n + 2 * spans tokens.
    """
    n, stops = len(tokens), starts + lengths
    width = lengths[order] + 1  # of each block
    ends = width.cumsum()
    heads = ends - width  # where each block begins in the target
    place = np.arange(ends[-1])
    inside = (starts[order] - heads).repeat(width) + place  # text index of each target token; eop's is the next token's
    kept = np.ones(n + 1, bool)
    kept[inside] = False
    kept[starts] = kept[stops] = True
    marked = tokens.copy()
    marked[starts] = blank
    text = marked[kept[:n]]
    context = len(text)

    read, predicted = np.empty((2, context + len(place)), np.int32)
    read[:context] = predicted[:context] = text
    predicted[context:] = tokens.take(inside, mode="clip")
    predicted[context + ends - 1] = special.eop
    read[context + 1 :] = predicted[context:-1]
    read[context + heads] = special.sop
    blanks = stops - lengths.cumsum() + np.arange(len(starts))  # [spans], in the context
    return Sample(read, predicted, *sample_positions(context, blanks[order], width, repeat=True), context)


def blank_one(
    tokens: np.ndarray, start: int, stop: int, blank: int, special: SpecialTokens, two_streams: bool = False,
    end: bool = True,
) -> Sample:  # fmt: skip
    """Return the sample in which tokens[start:stop] is the only blank; target positions continue the context's.

    Args:
        tokens: int32 [n], the text.
        start, stop: of the blank, at least one token.
        blank: the id that stands for it in the context.
        special: ids of sop and eop.
        two_streams: repeat the blank's position in the target instead.
        end: end the target in eop.

    Returns:
        A Sample of n + 2 tokens, or n + 1 without `end`.
    """
    target, context = tokens[start:stop], len(tokens) - (stop - start) + 1
    read, predicted = np.empty((2, context + len(target) + int(end)), np.int32)
    read[:start] = tokens[:start]
    read[start] = blank
    read[start + 1 : context] = tokens[stop:]
    read[context] = special.sop
    read[context + 1 :] = target if end else target[:-1]
    predicted[:context] = read[:context]
    predicted[context : context + len(target)] = target
    if end:
        predicted[-1] = special.eop
    width = np.array([len(read) - context])
    return Sample(read, predicted, *sample_positions(context, np.array([start]), width, repeat=two_streams), context)


def mask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions,
    room: int | None = None,
) -> Sample:  # fmt: skip
    """Blank random spans of `tokens` (int32 [n], n >= 1) as [MASK].

    A draw that does not fit `room` places is repeated. `text_length` keeps that below one in a thousand, and so the
    bias against longer draws, which have more and shorter spans. With `cut_targets` the sample is cut instead.

    Raises:
        ValueError: `room` is less than `places` reserves for that many tokens.
    """
    n = len(tokens)
    lengths = draw_lengths(n, generator, options)
    while room is not None and not options.cut_targets and n + 2 * len(lengths) > room:
        if room < places("mask", 1 << n.bit_length(), options)[n]:
            raise ValueError(f"{n} text tokens and their spans do not fit {room} places")
        lengths = draw_lengths(n, generator, options)
    starts, lengths = place_spans(lengths, n, generator)
    order = generator.permutation(len(starts))
    sample = blank_spans(tokens, starts, lengths, order, special.mask, special)
    if options.block_mask_prob > 0:
        inside = np.flatnonzero(sample.block_positions > 1)
        hidden = inside[generator.random(len(inside)) < options.block_mask_prob]
        sample.tokens[hidden] = options.block_mask_token
    if room is not None and len(sample) > room:
        read, predicted, positions, block_positions = (array[:room] for array in sample[:4])
        sample = Sample(read, predicted, positions, block_positions, min(sample.context, room))
    return sample


def gmask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions
) -> Sample:
    """Blank one long span of `tokens` (int32 [n], n >= 1) as [gMASK], at the end of the text unless infilling.

    An infill ends in eop, because text follows it; at the end of the text, the target does if `gmask_eop` is set.
    """
    n = len(tokens)
    length = max(1, int(generator.integers(int(options.gmask_min_ratio * n), n + 1)))
    start, end = n - length, options.gmask_eop
    if options.gmask_infill_prob > 0:
        infill = generator.random() < options.gmask_infill_prob
        anywhere = int(generator.integers(0, start + 1))
        if infill and not (tokens[:-1] == special.eos).any():
            start, end = anywhere, True
    return blank_one(tokens, start, start + length, special.gmask, special, options.two_streams, end)


def smask_sample(
    tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens, options: BlankOptions,
    sentence_ends: np.ndarray, room: int | None = None,
) -> Sample:  # fmt: skip
    """Blank whole sentences of `tokens` (int32 [n], n >= 1) as [sMASK], in random order until the ratio is reached.

    Args:
        sentence_ends: bool [V], True for tokens that end a sentence; see `find_sentence_ends`.
        room: places the sample may fill. Many one-token sentences could exceed it; fewer are then blanked.
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
        tokens, starts[in_text], lengths[in_text], np.searchsorted(in_text, chosen), special.smask, special
    )


def instruction_sample(document: np.ndarray, special: SpecialTokens, room: int, options: BlankOptions) -> Sample:
    """Return the sample of a prompt and its answer, with continuing positions, like GLM-130B's multi-task samples.

    Args:
        document: int32 [n], the prompt after the tokenizer's prefix, [MASK], the answer (at least one token) and a last
            token, which eop replaces. The sample has n tokens, too, if they fit.
        special: ids of the special tokens.
        room: places the sample may fill. The answer is kept, and the prompt is cut at its beginning. An answer that
            does not fit alone is cut at its end, without eop; prompts.py leaves such samples out.
        options: `instruction_blank`, which of [MASK] and [gMASK] stands for the answer; and `two_streams`, to repeat
            the position of the blank in the answer.
    """
    divide, head = int(np.argmax(document == special.mask)), len(special.prefix)
    target = document[divide + 1 : -1]
    whole = head + len(target) + 2 <= room
    target = target if whole else target[: room - 1 - head]
    kept = room - 2 - len(target) - head if whole else 0  # tokens of the prompt, if there are so many
    text = np.concatenate([document[:head], document[max(head, divide - kept) : divide]])
    tokens = np.concatenate([text, target])
    blank = special.gmask if options.instruction_blank == "gmask" else special.mask
    return blank_one(tokens, len(text), len(tokens), blank, special, options.two_streams, end=whole)


def with_prefix(sample: Sample, prefix: tuple[int, ...]) -> Sample:
    """Return a sample whose context begins in `prefix`; its S grows by the prefix's length."""
    if not prefix:
        return sample
    count, head = len(prefix), np.array(prefix, np.int32)
    return Sample(
        np.concatenate([head, sample.tokens]),
        np.concatenate([head, sample.targets]),
        np.concatenate([np.arange(count, dtype=np.int32), sample.positions + np.int32(count)]),
        np.concatenate([np.zeros(count, np.int32), sample.block_positions]),
        sample.context + count,
    )


def find_sentence_ends(pieces: Sequence[str]) -> np.ndarray:
    """Return bool [V]: which pieces of a vocabulary contain a mark that ends a sentence."""
    return np.array([not SENTENCE_ENDS.isdisjoint(piece) for piece in pieces], bool)


def make_samples(
    objective: str, tokens: np.ndarray, generator: np.random.Generator, special: SpecialTokens,
    options: BlankOptions, room: int, sentence_ends: np.ndarray | None = None,
) -> list[Sample]:  # fmt: skip
    """Return the samples of one segment: one, or two if `short_seq_prob` cuts a [MASK] text in two.

    Args:
        objective: one of OBJECTIVES.
        tokens: int32 [n], a text that fits in `room` (see `text_length`), or an instruction document of any length.
        generator: drawn from in a fixed order, so that the samples are a function of its state.
        special, options: ids and settings.
        room: places of the row that the samples may fill together.
        sentence_ends: bool [V], for `smask`.

    Raises:
        UserError: `smask` without `sentence_ends`.
    """
    if objective == "instruction":
        return [instruction_sample(tokens, special, room, options)]
    if objective == "gmask":
        return [gmask_sample(tokens, generator, special, options)]
    if objective == "smask":
        if sentence_ends is None:
            raise UserError("smask needs to know which tokens end a sentence: give sentence_ends")
        return [smask_sample(tokens, generator, special, options, sentence_ends, room)]
    if options.short_seq_prob > 0 and generator.random() < options.short_seq_prob and len(tokens) + 4 <= room:
        cut = int(generator.integers(min(options.shortest_seq, len(tokens) - 1), len(tokens)))
        if options.cut_targets:
            return [mask_sample(tokens[:cut], generator, special, options, room)]
        while True:
            parts = [mask_sample(part, generator, special, options) for part in (tokens[:cut], tokens[cut:])]
            if sum(map(len, parts)) <= room:
                return parts
    return [mask_sample(tokens, generator, special, options, room)]
