"""Prompts with blanks: what is text and what is a blank, which blank is filled next, and the context it is filled in.

The rules are those of the released GLM-130B, except that all kinds of blanks are filled, one kind after the other.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError

KINDS = ("[MASK]", "[sMASK]", "[gMASK]")  # in the order in which they are filled
BLANK = re.compile(r"\[[sg]?MASK\]")


class Fill(NamedTuple):
    """What was generated for a blank."""

    text: str
    tokens: tuple[int, ...]  # without the end token; with a stop string, up to the token that completed it
    log_probabilities: tuple[float, ...]  # the model's own, in nats, of each token
    finish_reason: Literal["end", "length", "stop"]  # an end token, the budget, a stop string


class Piece(NamedTuple):
    """A part of a prompt: text, a blank, or what a blank was filled with."""

    text: str
    tokens: tuple[int, ...]
    blank: bool = False
    fill: Fill | None = None


class Context(NamedTuple):
    """What the model reads before it fills a blank."""

    tokens: list[int]  # the whole prompt with its blanks, then sop; the last one is read when the fill begins
    blank: int  # the place of the blank
    repeats: bool  # whether the fill keeps the blank's position ([MASK], [sMASK]), or continues to count ([gMASK])
    earlier: tuple[tuple[int, int], ...] = ()  # of fills that follow the context: their blanks, their tokens with sop
    causal: bool = False  # whether sop stands right after the blank and the text follows it, seen from left to right


def masks(tokenizer: Tokenizer) -> dict[str, int]:
    """Return the id of each kind of blank."""
    return dict(zip(KINDS, (tokenizer.mask, tokenizer.smask, tokenizer.gmask), strict=True))


def parse(tokenizer: Tokenizer, prompt: str) -> list[Piece]:
    """Split a prompt at its blanks. A prompt without a blank is read as if it ended in [gMASK].

    Raises:
        UserError: it is empty, or not valid UTF-8.
    """
    if not prompt.strip():
        raise UserError("the prompt is empty: write some text with a [MASK] in it")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt is not valid UTF-8: check its encoding, or that of the terminal")
    return pieces(tokenizer, prompt if BLANK.search(prompt) else f"{prompt}[gMASK]")


def pieces(tokenizer: Tokenizer, text: str) -> list[Piece]:
    """Split a text at its blanks."""
    if tokenizer.strips_before_blanks:
        text = re.sub(rf"\s+({BLANK.pattern})", r"\1", text)
    ids, found = masks(tokenizer), list[Piece]()
    for part in re.split(f"({BLANK.pattern})", text):
        if part in ids:
            found.append(Piece(part, (ids[part],), blank=True))
        elif part:
            found.append(Piece(part, tuple(tokenizer.encode(part).tolist())))
    return found


def first_kind(pieces: Sequence[Piece]) -> tuple[str, ...]:
    """Return the one kind of blanks that the released code fills; the others stay as they are."""
    return next(((kind,) for kind in KINDS if any(piece.blank and piece.text == kind for piece in pieces)), ())


def next_blank(pieces: Sequence[Piece], kinds: Sequence[str] = KINDS) -> int | None:
    """Return the index of the blank to fill next: the first of the first kind that is there. None if none is left."""
    for kind in kinds:
        for place, piece in enumerate(pieces):
            if piece.blank and piece.text == kind:
                return place
    return None


def context(tokenizer: Tokenizer, pieces: Sequence[Piece], place: int) -> Context:
    """Return the context in which the blank at index `place` is filled.

    It has the tokenizer's prefix and suffix around it. Without a suffix it ends in eos, unless in a blank.
    """
    tokens = [*tokenizer.prefix, *(token for piece in pieces for token in piece.tokens), *tokenizer.suffix]
    if not tokenizer.suffix and not pieces[-1].blank:
        tokens.append(tokenizer.eos)
    blank = len(tokenizer.prefix) + sum(len(piece.tokens) for piece in pieces[:place])
    return Context([*tokens, tokenizer.sop], blank, pieces[place].text != "[gMASK]")


def find_stop(text: str, stops: Sequence[str]) -> int | None:
    """Return where the first stop string of a text begins, or None if it has none."""
    return min((text.find(stop) for stop in stops if stop in text), default=None)


def refill(tokenizer: Tokenizer, fill: Fill) -> list[Piece]:
    """Return a fill as pieces, with a blank for each mask in it: the released code fills masks that a model makes."""
    ids = {token: kind for kind, token in reversed(masks(tokenizer).items())}
    pieces, start = list[Piece](), 0
    for place, token in [*enumerate(fill.tokens), (len(fill.tokens), -1)]:
        if token in ids or token < 0:
            part = fill.tokens[start:place]
            text = tokenizer.decode(part)
            log_probabilities = fill.log_probabilities[start:place]
            if part or not pieces:
                pieces.append(Piece(text, part, fill=Fill(text, part, log_probabilities, fill.finish_reason)))
            if token in ids:
                pieces.append(Piece(ids[token], (token,), blank=True))
            start = place + 1
    return pieces
