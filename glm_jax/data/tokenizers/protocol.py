"""What a tokenizer is to everything that uses one."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Protocol

import numpy as np


class Tokenizer(Protocol):
    """Text to token ids and back. Picklable, as processes that tokenise need it.

    Attributes:
        model: the bytes that make it; a workdir and the cache keep them as tokenizer.model, and `load.load` reads them.
        digest: sha256 of `model`, hexadecimal; the tokenizer's identity, wherever its files are.
        size: ids are below this.
        pad, unk, eos, mask, gmask, smask, sop, eop: ids of the special tokens. Where a family has no [gMASK] or no
            [sMASK], their blanks are [MASK] in its contexts, and `gmask` or `smask` is `mask`.
        prefix, suffix: ids that stand before and after each context: the original GLM's [CLS] and eos; empty for our
            own tokenizers and GLM-130B's.
        strips_before_blanks: whether spaces before a blank belong to the blank, as in the original GLM's byte-level
            tokenizers, where a fill begins with its own space.
        token_bytes: int32 [size], the number of UTF-8 bytes of text that each id stands for; 0 for special tokens.
    """

    model: bytes
    digest: str
    size: int
    pad: int
    unk: int
    eos: int
    mask: int
    gmask: int
    smask: int
    sop: int
    eop: int
    prefix: tuple[int, ...]
    suffix: tuple[int, ...]
    strips_before_blanks: bool
    token_bytes: np.ndarray

    def encode(self, text: str, /) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. Special tokens written in the text stay text."""
        ...

    def decode(self, ids: Iterable[int], /, *, specials: bool = False) -> str:
        """Return the text of `ids`. Special tokens have their names if `specials`, else no text."""
        ...
