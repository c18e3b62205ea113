"""Fill a few held-out blanks, so that a finished run shows what it has learnt."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import NamedTuple, Protocol

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError, printable
from glm_jax.inference.decode import NotFinite
from glm_jax.inference.fill import fill
from glm_jax.model import GLMConfig
from glm_jax.types import Tree

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
    cfg: GLMConfig,
    params: Tree,
    tokenizer: Tokenizer,
    documents: Mapping[str, Sequence[np.ndarray] | Documents],
    count: int = 3,
) -> Iterator[Example]:
    """Yield, for each source, `count` held-out passages with one blank, filled greedily.

    Raises:
        NotFinite: the model's logits are not finite.
    """
    side = min(CONTEXT, (cfg.max_length - SPAN - BUDGET) // 4)  # half a row: encoded again it may have more tokens
    for source, held_out in documents.items():
        shown = 0
        for index in range(len(held_out)):
            tokens = np.asarray(held_out[index])[:-1]  # without eos
            if shown == count or side < 1:
                break
            if len(tokens) < 2 * side + SPAN:
                continue
            start = min(len(tokens) // 2, len(tokens) - side - SPAN)
            before = tokenizer.decode(tokens[start - side : start])
            truth = tokenizer.decode(tokens[start : start + SPAN])
            after = tokenizer.decode(tokens[start + SPAN : start + SPAN + side])
            try:
                pieces = fill(cfg, params, tokenizer, f"{before}[MASK]{after}", max_tokens=BUDGET)
            except NotFinite:
                raise
            except UserError:  # encoded again, this passage does not fit a row
                continue
            shown += 1
            filled = " / ".join(piece.text for piece in pieces if piece.filled)
            yield Example(source, f"{before}[MASK]{after}", truth, filled)
