"""A source as one run of tokens, cut into a window for each row: nothing is lost, documents are cut anywhere.

Each epoch cuts the run into blocks of a few rows' text, from a new starting point and in a new order. Objectives take
blocks in turn, as their rows come up. The objective that takes a block cuts it into rows, because a [MASK] row holds
less text than a [gMASK] row. `OPEN` blocks are read side by side, so that neighbouring rows do not come from the same
page.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from typing import Protocol

import numpy as np

from glm_jax.errors import UserError

BLOCK_ROWS = range(6, 17)  # candidates for the rows of the longest text in a block; the one that wastes least is used
OPEN = 16  # blocks that an objective reads side by side
CACHED = 16 * OPEN  # documents kept in memory: one cut by a window is read again at its block's next turn
SMALLEST_STREAM = 16  # tokens that a source needs


class Documents(Protocol):
    """A source: documents in a fixed, shuffled order, each ending in eos.

    Attributes:
        lengths: int64 [documents], the tokens of each, including eos.
    """

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


class Stream:
    """A source as one run of tokens, and how an epoch of it is cut into blocks.

    Attributes:
        tokens: length of the stream.
        blocks: number of blocks in an epoch.
        together: number of blocks that an objective opens at a time.
        rows: by objective, the number of rows in a block.
    """

    def __init__(self, name: str, documents: Documents, takes: Mapping[str, int], seed: int) -> None:
        """Plan the cuts.

        Args:
            name: the source's name. With `seed` it keys the order of the blocks.
            documents: the text.
            takes: by objective, the number of text tokens in a row.
            seed: of the run.

        Raises:
            UserError: there are fewer than SMALLEST_STREAM tokens.
        """
        self._document = functools.lru_cache(CACHED)(documents.__getitem__)
        self._offsets = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)])
        self._epoch = functools.lru_cache(1024)(self._find_epoch)
        self._key = (seed, zlib.crc32(name.encode("utf-8")))
        self.tokens = int(self._offsets[-1])
        if self.tokens < SMALLEST_STREAM:
            raise UserError(f"source {name} holds {self.tokens} tokens, it needs at least {SMALLEST_STREAM}: add text")
        longest = max(takes.values())
        best = min(BLOCK_ROWS, key=lambda rows: max(_waste(rows * longest, take) for take in takes.values()))
        block = longest * min(best, max(1, self.tokens // (16 * longest)))
        self.blocks = -(-self.tokens // block)
        self.together = min(OPEN, max(1, self.blocks // OPEN))
        longest_block = -(-self.tokens // self.blocks)
        self.rows = {objective: -(-longest_block // take) for objective, take in takes.items()}

    def _find_epoch(self, epoch: int) -> tuple[int, int]:
        """Return (key of the block order, rotation: the token at which the epoch's stream begins)."""
        order, rotation = np.random.SeedSequence((*self._key, epoch)).generate_state(2, np.uint64)
        return int(order), int(rotation) % self.tokens

    def locate(self, turn: int, objective: str, row: int, window: int | None = None) -> tuple[int, int, int]:
        """Return (epoch, start, stop) of a row's text.

        Args:
            turn: how many times blocks of this stream were opened before, by any objective.
            objective: the one that opened these blocks.
            row: which of the `together * rows[objective]` rows in these blocks.
            window: which of the epoch's windows to take instead of the next in order.
        """
        part, lane = divmod(row, self.together)
        epoch, place = divmod(turn * self.together + lane, self.blocks)
        order, _ = self._epoch(epoch)
        parts = self.rows[objective]
        if window is None:
            block = shuffled(place, self.blocks, order)
        else:
            block, part = divmod(window % (self.blocks * parts), parts)
        first, last = (b * self.tokens // self.blocks for b in (block, block + 1))
        return epoch, first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts

    def read(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return tokens [start, stop) of an epoch's stream, counted from its rotation: int32 [stop - start]."""
        _, rotation = self._epoch(epoch)
        start, stop = start + rotation, stop + rotation
        if start >= self.tokens:
            start, stop = start - self.tokens, stop - self.tokens
        pieces = self._pieces(start, min(stop, self.tokens))
        if stop > self.tokens:
            pieces += self._pieces(0, stop - self.tokens)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> list[np.ndarray]:
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        pieces = []
        for index in range(first, last):
            begin = int(self._offsets[index])
            pieces.append(np.asarray(self._document(index)[max(start - begin, 0) : stop - begin], np.int32))
        return pieces


def shuffled(index: int, size: int, key: int) -> int:
    """Return the place of `index` in the permutation of 0..size-1 that `key` selects, in constant time.

    A Feistel network over two digits in base sqrt(size). Results outside 0..size-1 go through it again.
    """
    base = math.isqrt(max(size, 1) - 1) + 1
    while True:
        high, low = divmod(index, base)
        for turn in range(8):
            mixed = (low + turn * 0x9E3779B97F4A7C15 ^ key) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            high, low = low, (high + (mixed >> 32)) % base
        index = high * base + low
        if index < size:
            return index


def _waste(block: int, take: int) -> float:
    """Return the share of a row that stays empty if rows of at most `take` tokens split a block evenly."""
    return 1 - block / (take * -(-block // take))
