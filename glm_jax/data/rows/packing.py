"""Rows of whole documents: grouped once, and found in any epoch's order without state."""

from __future__ import annotations

import functools
import zlib

import numpy as np

from glm_jax.data.rows.streams import CACHED, Documents, shuffled
from glm_jax.errors import UserError


def cut_long(lengths: np.ndarray, longest: int) -> np.ndarray:
    """Return pieces of at most `longest` tokens, int64 [pieces, 3] of (document, start, stop), in order.

    A document that fits is one piece. A longer one is cut evenly.
    """
    parts = -(-lengths // longest)  # [documents]
    document = np.repeat(np.arange(len(lengths)), parts)  # [pieces]
    part = np.arange(len(document)) - np.repeat(np.cumsum(parts) - parts, parts)
    start, stop = (place * lengths[document] // parts[document] for place in (part, part + 1))
    return np.stack([document, start, stop], axis=1)


def best_fit(sizes: np.ndarray, room: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Group items into rows of `room` places: the largest first, each into the fullest row that still has room for it.

    No two rows could be merged, and few places stay empty if there are many small items.

    Args:
        sizes: int [items], each from 1 to `room`.
        room: places of a row.
        seed: of the random order of equally large items.

    Returns:
        (order, starts): row r holds the items order[starts[r] : starts[r + 1]].
    """
    mixed = np.random.default_rng(seed).permutation(len(sizes))
    rows = np.zeros(len(sizes), np.int64)
    with_room: list[list[int]] = [[] for _ in range(room + 1)]  # rows, by how many places they have left
    present = 0  # bit s is set if some row has s places left
    count = 0
    for item in mixed[np.argsort(-sizes[mixed], kind="stable")].tolist():
        size = int(sizes[item])
        fitting = present >> size
        if fitting:
            left = size + (fitting & -fitting).bit_length() - 1
            row = with_room[left].pop()
            if not with_room[left]:
                present &= ~(1 << left)
        else:
            row, left = count, room
            count += 1
        with_room[left - size].append(row)
        present |= 1 << (left - size)
        rows[item] = row
    order = mixed[np.argsort(rows[mixed], kind="stable")]
    return order, np.concatenate([[0], np.cumsum(np.bincount(rows, minlength=count))])


def by_number(count: int, together: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Group items at random into rows of `together` each; the last may hold fewer. See `best_fit`."""
    order = np.random.default_rng(seed).permutation(count)
    return order, np.append(np.arange(0, count, together), count)


class Packing:
    """A source whose rows hold whole documents. It takes about 40 bytes of memory per document.

    Attributes:
        rows: the number of rows in an epoch.
    """

    def __init__(
        self, name: str, documents: Documents, pieces: np.ndarray, groups: tuple[np.ndarray, np.ndarray], seed: int
    ) -> None:
        """Take a grouping of pieces of documents.

        Args:
            name: the source's name. With `seed` it keys the order of the rows.
            documents: the text.
            pieces: as `cut_long` returns them.
            groups: (order, starts) over `pieces`, as `best_fit` returns them.
            seed: of the run.

        Raises:
            UserError: there are no documents.
        """
        if not len(pieces):
            raise UserError(f"source {name} holds no documents: add some")
        self._document = functools.lru_cache(CACHED)(documents.__getitem__)
        self._pieces = pieces[groups[0]]
        self._starts = groups[1]
        self._key = (seed, zlib.crc32(name.encode("utf-8")))
        self._epoch = functools.lru_cache(1024)(self._find_epoch)
        self.rows = len(self._starts) - 1

    def _find_epoch(self, epoch: int) -> int:
        return int(np.random.SeedSequence((*self._key, epoch)).generate_state(1, np.uint64)[0])

    def locate(self, ordinal: int) -> tuple[int, int, int]:
        """Return (epoch, start, stop) of the source's ordinal-th row, which holds the pieces from start to stop."""
        epoch, place = divmod(ordinal, self.rows)
        row = shuffled(place, self.rows, self._epoch(epoch))
        return epoch, int(self._starts[row]), int(self._starts[row + 1])

    def read(self, start: int, stop: int) -> list[np.ndarray]:
        """Return the pieces from start to stop, each int32 [S]."""
        return [
            np.asarray(self._document(document)[first:last], np.int32)
            for document, first, last in self._pieces[start:stop].tolist()
        ]
