"""Rows for evaluation, token for token those of the released GLM-130B: choices in blanks, prompts, sliding windows."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference.batch import row_positions
from glm_jax.inference.prompts import Context
from glm_jax.inference.scoring import Row
from glm_jax.model import GLMConfig


@dataclasses.dataclass(frozen=True)
class Reading:
    """How the texts of a task are read.

    Attributes:
        gmask: whether [gMASK] is the blank, where positions continue to count; else [MASK], whose target repeats its
            position.
        causal: read from left to right, as the target of a [gMASK] at the beginning.
        longest: tokens of a row, at most; a context keeps its last ones.
        counts: let the positions of a target count up from a [MASK] at the end ("unified multitask encoding").
        causal_context: the tokens of a context see only what is before them; rows are otherwise the same.
    """

    gmask: bool = False
    causal: bool = False
    longest: int = 2048
    counts: bool = False
    causal_context: bool = False

    def __post_init__(self) -> None:
        if self.causal and not self.gmask:
            raise UserError("unidirectional needs use_task_mask: text is read from left to right after [gMASK] alone")

    def blank(self, tokenizer: Tokenizer) -> int:
        """Return the token of the blank that is filled."""
        return tokenizer.gmask if self.gmask else tokenizer.mask


class Question(NamedTuple):
    """A context and what may follow it."""

    context: Sequence[int]
    choices: Sequence[Sequence[int]]

    @property
    def single(self) -> bool:
        """Whether every choice is one token."""
        return sum(map(len, self.choices)) == len(self.choices)


class Choices(NamedTuple):
    """The rows of a question. Their targets, one row after the other, are the choices in order."""

    rows: list[Row]
    kept: int  # tokens of the context; the first ones are cut off where it is too long


def room(cfg: GLMConfig, tokenizer: Tokenizer, reading: Reading) -> int:
    """Return how many tokens a row may have, without what the tokenizer puts around a context."""
    return min(reading.longest, cfg.max_length) - len(tokenizer.prefix) - len(tokenizer.suffix)


def context(tokenizer: Tokenizer, tokens: Sequence[int], reading: Reading) -> Context:
    """Return the context of a task's tokens: with a blank at the end if they have none of its kind.

    A blank of the other kind is an ordinary token, and no eos is put at the end, unlike in prompts.

    Raises:
        UserError: a blank in a text that is read from left to right.
    """
    blank = reading.blank(tokenizer)
    before, tokens = [*tokenizer.prefix], [*tokens]
    if reading.causal:
        if blank in tokens:
            raise UserError("the text has a blank: unidirectional reading only continues texts, leave the blank out")
        return Context([*before, blank, tokenizer.sop, *tokens], len(before), repeats=False, causal=True)
    if blank not in tokens:
        tokens.append(blank)
    place = len(before) + tokens.index(blank)
    return Context([*before, *tokens, *tokenizer.suffix, tokenizer.sop], place, repeats=not reading.gmask)


def choices(
    cfg: GLMConfig, tokenizer: Tokenizer, question: Question, reading: Reading, *, single: bool = False
) -> Choices:
    """Return the row in which all choices of a question are scored at once.

    Each choice is a block of sop and the choice without its last token; blocks do not see one another. Each choice has
    a row of its own with ALiBi, where distances would depend on the blocks before, and where one row cannot hold all.

    Args:
        cfg: the model.
        tokenizer: of the model.
        question: its context may be longer than the row.
        reading: of the task.
        single: whether all choices of the file are one token: then a single sop is read for all of them.

    Raises:
        UserError: a choice leaves no room for a context.
    """
    longest = room(cfg, tokenizer, reading)
    size, crowded = _choices_size(question, longest, single)
    # the released code reserves one token for choices of one token, even where they get a block each
    together = len(question.context) + 1 + size <= cfg.max_length
    reserved = 1 if question.single and (single or together) else size
    kept = cut(question.context, longest - reserved - 2, f"choices of {size} tokens")
    read = context(tokenizer, kept, reading)
    if single:
        targets = [choice[0] for choice in question.choices]
        one = _row(cfg, read, [question.choices[0]], reading)
        return Choices([one._replace(places=one.places * len(targets), targets=targets)], len(kept))
    blocks = [[choice] for choice in question.choices] if crowded or cfg.position == "alibi" else [question.choices]
    return Choices([_row(cfg, read, some, reading) for some in blocks], len(kept))


def context_room(
    cfg: GLMConfig, tokenizer: Tokenizer, question: Question, reading: Reading, *, single: bool = False
) -> int:
    """Return how many tokens of context a question's row holds whatever its length; below 0 if not even choices fit.

    The arguments are those of `choices`, which may keep more of a short context.
    """
    longest = room(cfg, tokenizer, reading)
    return longest - (1 if single else _choices_size(question, longest, single)[0]) - 2


def _choices_size(question: Question, longest: int, single: bool) -> tuple[int, bool]:
    """Return how many tokens a row has for choices, and whether each choice needs a row of its own."""
    size = sum(map(len, question.choices))
    crowded = size + 2 > longest and not single
    return (max(map(len, question.choices)) if crowded else size), crowded


def cut(tokens: Sequence[int], limit: int, other: str) -> Sequence[int]:
    """Return the last `limit` tokens.

    Raises:
        UserError: `other` leaves no room for any.
    """
    if limit < 0:
        raise UserError(f"{other} leave no room for a context in the model's rows: shorten them")
    return tokens[max(len(tokens) - limit, 0) :]


def _row(cfg: GLMConfig, read: Context, targets: Sequence[Sequence[int]], reading: Reading) -> Row:
    """Return the row of one context and several targets."""
    shared = len(read.tokens) if read.causal else len(read.tokens) - 1  # tokens before the blocks
    tokens, blocks, places = read.tokens[:shared], [0] * shared, list[int]()
    positions = [row_positions(cfg, read, shared + max(map(len, targets)))]  # those of each block begin anew
    around = positions[0][..., :shared]
    parts = [around]
    for block, target in enumerate(targets, 1):
        fed = [*target[:-1]] if read.causal else [read.tokens[-1], *target[:-1]]
        start = len(tokens)
        places += [shared - 1, *range(start, start + len(fed))] if read.causal else [*range(start, start + len(fed))]
        tokens, blocks = [*tokens, *fed], [*blocks, *[block] * len(fed)]
        follows = positions[0][..., shared : shared + len(fed)]
        if reading.counts and read.repeats and cfg.position != "learned_2d":
            follows = read.blank + np.arange(len(fed), dtype=np.int32)
        parts.append(follows)
    seen = 0 if read.causal or reading.causal_context else shared
    if len(targets) == 1:
        blocks = [0] * len(tokens)
    flat = [token for target in targets for token in target]
    return Row(tokens, np.concatenate(parts, axis=-1), seen, blocks, places, flat)


class Windows(NamedTuple):
    """How a text is cut into windows: each has up to `width` tokens and begins `stride` after the one before."""

    width: int
    stride: int

    def count(self, tokens: int) -> int:
        """Return how many windows a text has."""
        return -(-max(tokens - self.width, 0) // self.stride) + 1


def windows(cfg: GLMConfig, tokenizer: Tokenizer, reading: Reading, stride: int) -> Windows:
    """Return the windows of a task; a stride that does not fit in the model's rows becomes half a window."""
    width = room(cfg, tokenizer, reading) - 1
    return Windows(width, stride if stride < width else max(width // 2, 1))


def window(
    cfg: GLMConfig,
    tokenizer: Tokenizer,
    tokens: Sequence[int],
    number: int,
    cutting: Windows,
    reading: Reading,
    *,
    once: bool = True,
) -> Row:
    """Return window `number` of a text.

    The first one scores all its tokens after a blank. The others read what the window before has scored as context,
    and score what follows it. Positions count straight on, those of [MASK] too.

    Args:
        cfg: the model.
        tokenizer: of the model.
        tokens: the whole text, at least one.
        number: from 0.
        cutting: from `windows`.
        reading: of the task; from left to right, the whole window follows the blank.
        once: score each token once. The released code scores all tokens of each causal window, so that those in which
            windows overlap count several times.
    """
    start = number * cutting.stride
    inside = [*tokens[start : start + cutting.width]]
    new = min(cutting.width - cutting.stride, len(inside)) if number else 0  # the place of the first new token
    prompt = 0 if reading.causal else new
    blank = reading.blank(tokenizer)
    before = [*tokenizer.prefix, *inside[:prompt], blank, *tokenizer.suffix]
    read = Context([*before, tokenizer.sop], len(tokenizer.prefix) + prompt, repeats=False)
    fed = [*read.tokens, *inside[prompt:-1]]
    skipped = new if reading.causal and once else 0
    places = [*range(len(before) + skipped, len(fed))]
    positions = row_positions(cfg, read, len(fed))
    return Row(fed, positions, len(before), [0] * len(fed), places, inside[prompt + skipped :])
