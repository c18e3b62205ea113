"""Fill a few held-out blanks, so that a finished run shows what it has learnt."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from glm_jax.errors import UserError, printable
from glm_jax.inference import prompts
from glm_jax.inference.model import Model

CONTEXT = 24  # tokens on each side of the blank
SPAN = 3  # tokens in the blank, about the mean length in training
BUDGET = 12  # tokens in a fill, at most


class Documents(Protocol):
    """Tokenised documents."""

    def __len__(self) -> int: ...
    def __getitem__(self, index: int, /) -> np.ndarray: ...


class Example(NamedTuple):
    """A passage with a blank, its fill and the truth."""

    source: str
    text: str  # with [MASK] in the place of the target
    target: str
    filled: str

    def lines(self, language: str) -> str:
        """Return the example as two lines for a terminal."""
        text = printable(self.text, keep="\n\t")
        return f"{self.source} ({language}) ...{text}...\n    filled {self.filled!r}, was {self.target!r}"


def heldout(
    model: Model, documents: Mapping[str, Sequence[np.ndarray] | Documents], count: int = 3
) -> Iterator[Example]:
    """Yield, for each source, `count` held-out passages with one blank, filled greedily.

    Raises:
        NotFinite: the model's logits are not finite.
        UserError: the model has no tokenizer.
    """
    for source, held_out in documents.items():
        found = (_passage(model, held_out[index]) for index in range(len(held_out)))
        passages = list(itertools.islice((passage for passage in found if passage), count))
        results = model.fill([text for text, _ in passages], max_tokens=BUDGET)
        for (text, truth), filled in zip(passages, results, strict=True):
            yield Example(source, text, truth, " / ".join(fill.text for fill in filled.fills))


def _passage(model: Model, document: np.ndarray) -> tuple[str, str] | None:
    """Return a passage of a document with a blank in it, and what the blank replaces; None if it is too short."""
    tokenizer = model.tokenizer
    if tokenizer is None:
        raise UserError("the model has no tokenizer: convert its weights again, with --tokenizer FILE")
    longest = model.config.max_length
    side = min(CONTEXT, (longest - SPAN - BUDGET) // 4)  # half a row: encoded again it may have more tokens
    tokens = np.asarray(document)[:-1]  # without eos
    if side < 1 or len(tokens) < 2 * side + SPAN:
        return None
    start = min(len(tokens) // 2, len(tokens) - side - SPAN)
    before = tokenizer.decode(tokens[start - side : start])
    truth = tokenizer.decode(tokens[start : start + SPAN])
    after = tokenizer.decode(tokens[start + SPAN : start + SPAN + side])
    text = f"{before}[MASK]{after}"
    pieces = prompts.parse(tokenizer, text)
    place = prompts.next_blank(pieces)
    if place is None or len(prompts.context(tokenizer, pieces, place).tokens) >= longest:
        return None  # encoded again, it does not fit a row
    return text, truth
