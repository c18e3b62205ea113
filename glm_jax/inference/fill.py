"""Fill blanks in text: take a prompt with [MASK], [sMASK] or [gMASK], return the filled text."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import NamedTuple

import jax
import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference.decode import generate
from glm_jax.inference.strategies import GREEDY, Sampling
from glm_jax.model import GLMConfig
from glm_jax.types import Tree

BLANK = re.compile(r"\[[sg]?MASK\]")


class Piece(NamedTuple):
    """A part of the filled text: the prompt's own, or the fill of a blank."""

    text: str
    filled: bool


def fill(
    cfg: GLMConfig,
    params: Tree,
    tokenizer: Tokenizer,
    prompt: str,
    *,
    max_tokens: int = 64,
    sampling: Sampling = GREEDY,
    seed: int = 1234,
    say: Callable[[str], None] | None = None,
) -> list[Piece]:
    """Fill every blank of a prompt in turn; each fill is context for the next.

    [MASK] blanks come first, then [sMASK], then [gMASK]. A prompt without a blank is treated as if it ended in [gMASK].
    The context has the tokenizer's prefix and suffix around it; without a suffix it ends in eos, unless in a blank.

    Args:
        cfg, params, tokenizer: the trained model.
        prompt: text with blanks.
        max_tokens: the largest number of tokens in a fill; fewer if the model's longest row has no place for them.
        sampling: how tokens are chosen.
        seed: of the sampling.
        say: called with one line if a fill may have fewer than `max_tokens` tokens.

    Raises:
        UserError: the prompt is empty or not valid UTF-8, or leaves no place in the model's longest row, or the model's
            logits are not finite (NotFinite).
    """
    pieces = _split(prompt, strip=tokenizer.strips_before_blanks)
    ends = [tokenizer.eop, tokenizer.eos]
    kinds = {"[MASK]": tokenizer.mask, "[sMASK]": tokenizer.smask, "[gMASK]": tokenizer.gmask}
    banned = np.arange(cfg.vocab_size) >= tokenizer.size  # [V]
    banned[[*kinds.values(), tokenizer.sop, tokenizer.pad]] = True
    banned[ends] = False  # a family's pad may be its eos
    key = jax.random.key(seed)
    while (place := _first_blank(pieces)) is not None:
        encoded = [[kinds[piece.text]] if _is_blank(piece) else list(tokenizer.encode(piece.text)) for piece in pieces]
        context = [*tokenizer.prefix, *(token for part in encoded for token in part), *tokenizer.suffix]
        if not tokenizer.suffix and not _is_blank(pieces[-1]):
            context.append(tokenizer.eos)
        room = _room(cfg, len(context))
        if room < max_tokens and say is not None:
            say(f"{pieces[place].text} gets at most {room} tokens: the prompt has {len(context)}, "
                f"the model's rows hold {cfg.max_length}")  # fmt: skip
        key, fill_key = jax.random.split(key)
        generated = generate(
            cfg,
            params,
            context,
            len(tokenizer.prefix) + sum(len(part) for part in encoded[:place]),
            sop=tokenizer.sop,
            repeats=pieces[place].text != "[gMASK]",
            ends=ends,
            banned=banned,
            budget=min(max_tokens, room),
            sampling=sampling,
            key=fill_key,
        )
        pieces[place] = Piece(tokenizer.decode(generated), True)
    return pieces


def _room(cfg: GLMConfig, context: int) -> int:
    """Return how many tokens a fill may have after a context of so many tokens; sop takes a place, too."""
    room = cfg.max_length - context - 1
    if room < 1:
        raise UserError(
            f"the prompt has {context} tokens and leaves no place for a fill in the model's rows of {cfg.max_length}: "
            "shorten the prompt"
        )
    return room


def _split(prompt: str, *, strip: bool) -> list[Piece]:
    """Check a prompt and split it at its blanks, without the spaces before them if `strip`."""
    if not prompt.strip():
        raise UserError("the prompt is empty: write some text with a [MASK] in it")
    if any("\ud800" <= character <= "\udfff" for character in prompt):
        raise UserError("the prompt is not valid UTF-8: check the encoding of the terminal")
    if not BLANK.search(prompt):
        prompt += "[gMASK]"
    if strip:
        prompt = re.sub(rf"\s+({BLANK.pattern})", r"\1", prompt)
    return [Piece(text, False) for text in re.split(f"({BLANK.pattern})", prompt) if text]


def _is_blank(piece: Piece) -> bool:
    return not piece.filled and BLANK.fullmatch(piece.text) is not None


def _first_blank(pieces: list[Piece]) -> int | None:
    """Return the blank to fill next: the first [MASK], else the first [sMASK], else the first [gMASK]."""
    for kind in ("[MASK]", "[sMASK]", "[gMASK]"):
        for place, piece in enumerate(pieces):
            if not piece.filled and piece.text == kind:
                return place
    return None
