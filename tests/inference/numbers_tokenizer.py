"""A tokenizer for texts of decimal ids, as in the goldens of the released code."""

import re
from collections.abc import Iterable

import numpy as np


class Numbers:
    """Ids as text, with the special ids of the golden sets."""

    model = b""
    digest = ""
    size = 256
    pad = unk = 0
    smask, mask, gmask, sop, eop, eos = range(250, 256)
    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    strips_before_blanks = False
    token_bytes = np.ones(256, np.int32)

    def encode(self, text: str, /) -> np.ndarray:
        """Return the ids of a text."""
        return np.array([int(number) for number in re.findall(r"\d+", text)], np.int32)

    def decode(self, ids: Iterable[int], /, *, specials: bool = False) -> str:
        """Return ids as text."""
        return " ".join(str(number) for number in ids)
