"""Exact and near duplicates: which documents of a corpus to keep, whatever order they come in.

Two documents are near duplicates if the sets of their shingles (runs of three words, or of three characters of Chinese)
have a Jaccard similarity of at least a threshold. Candidates are found by MinHash signatures and locality-sensitive
hashing (Broder 1997; Indyk and Motwani 1998), which misses some pairs; each candidate is then compared by its shingles.
Between held-out and training documents nothing is missed: `twins` compares all of them.
"""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np

PERMUTATIONS = 128  # of a signature
FOUND = 0.97  # of the pairs at the threshold share a band, in expectation
SLACK = 0.15  # four standard errors of the similarity that two signatures estimate
BYTES_A_DOCUMENT = 800  # of memory that `near_duplicates` takes at a threshold of 0.8, signatures included
SHINGLE = 3  # units per shingle
BATCH = 1 << 14  # shingles permuted at once, so that a huge document needs no huge array
SCHEME = "affine32"  # datasketch's name for signatures of 32-bit hashes

# A word, or one character of scripts without spaces: kana, Han with extensions and compatibility forms.
_UNIT = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
                   "[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """A document to keep: its text, and its digest, which orders and splits a corpus."""

    digest: bytes
    text: str


def digest_of(text: str) -> bytes:
    """Return the sha256 of a text, runs of whitespace as one space. Equal digests mean exact duplicates."""
    return hashlib.sha256(" ".join(text.split()).encode()).digest()


def distinct(texts: Iterable[str]) -> tuple[list[Kept], int]:
    """Keep one document of each set of exact duplicates: the one that sorts first.

    Args:
        texts: documents. Each distinct text is held in memory once.

    Returns:
        The kept documents in the order of their digests, which shuffles them, and the number dropped.
    """
    first: dict[bytes, str] = {}
    dropped = 0
    for text in texts:
        digest = digest_of(text)
        if digest in first:
            dropped += 1
        first[digest] = min(text, first.get(digest, text))
    return [Kept(digest, first[digest]) for digest in sorted(first)], dropped


def units(text: str) -> list[str]:
    """Return the words of a text, and single characters of scripts without spaces, without case and punctuation."""
    return _UNIT.findall(text.casefold())


def shingles(text: str) -> np.ndarray:
    """Return the hashes of each run of SHINGLE units (words or Chinese characters), ignoring case.

    A text with fewer units is one shingle. So is a text without letters or digits, taken whole.

    Returns:
        uint32 [shingles], ascending, each once.
    """
    found = units(text) or [text]
    runs = range(max(1, len(found) - SHINGLE + 1))
    hashes = {zlib.crc32(" ".join(found[start : start + SHINGLE]).encode()) for start in runs}
    return np.array(sorted(hashes), np.uint32)


def signature(hashes: np.ndarray) -> np.ndarray:
    """Return the MinHash signature of a text's shingles: uint32 [PERMUTATIONS]."""
    from datasketch import MinHash  # imports scipy, which cached corpora need not wait for

    sketch = MinHash(PERMUTATIONS, hashfunc=int, scheme=SCHEME)
    for start in range(0, len(hashes), BATCH):
        sketch.update_batch(hashes[start : start + BATCH].tolist())
    return sketch.hashvalues.astype(np.uint32)


def similarity(first: np.ndarray, second: np.ndarray) -> float:
    """Return the Jaccard similarity of two sets of shingles."""
    shared = len(np.intersect1d(first, second, assume_unique=True))
    return shared / (len(first) + len(second) - shared)


def bands(threshold: float) -> tuple[int, int]:
    """Choose how many bands a signature is cut into, and the rows of each.

    A pair of similarity s shares a band of r rows with the probability 1 - (1 - s ** r) ** bands. The rows are the most
    that find FOUND of the pairs at the threshold: more rows make fewer candidates.
    """
    chosen = 1
    for rows in range(1, PERMUTATIONS + 1):
        if 1 - (1 - threshold**rows) ** (PERMUTATIONS // rows) >= FOUND:
            chosen = rows
    return PERMUTATIONS // chosen, chosen


def near_duplicates(signatures: np.ndarray, documents: Sequence[np.ndarray], threshold: float) -> np.ndarray:
    """Find the documents that are similar to one before them that is kept.

    With the documents in hash order the answer does not depend on the order they were read in.

    Args:
        signatures: uint32 [documents, PERMUTATIONS].
        documents: the shingles of each, which may be read from disk: they are asked for when a candidate is compared.
        threshold: in (0, 1).

    Returns:
        bool [documents]. The true similarity of each True to a kept document is at least the threshold.
    """
    count = len(signatures)
    near = np.zeros(count, bool)
    groups = _groups(signatures, threshold)  # [bands, documents]
    newest = np.full(int(groups.max(initial=-1)) + 1, -1, np.int32)  # the kept document last put into each group
    before = np.full(groups.shape, -1, np.int32)  # the one before it in the same group
    for number in np.flatnonzero((groups >= 0).any(0)).tolist():
        own = np.flatnonzero(groups[:, number] >= 0)
        candidates: set[int] = set()
        for band in own.tolist():
            other = int(newest[groups[band, number]])
            while other >= 0:
                candidates.add(other)
                other = int(before[band, other])
        found = np.array(sorted(candidates), np.int64)
        estimates = (signatures[found] == signatures[number]).mean(1)
        likely = found[estimates >= threshold - SLACK].tolist()
        near[number] = any(similarity(documents[other], documents[number]) >= threshold for other in likely)
        if not near[number]:
            before[own, number] = newest[groups[own, number]]
            newest[groups[own, number]] = number
    return near


def _groups(signatures: np.ndarray, threshold: float) -> np.ndarray:
    """Number the sets of documents that share a band: int32 [bands, documents], -1 for a document alone."""
    count, rows = bands(threshold)
    groups = np.full((count, len(signatures)), -1, np.int32)
    first = 0
    for band in range(count):
        part = np.ascontiguousarray(signatures[:, band * rows : (band + 1) * rows])  # [documents, rows]
        keys = part.view(f"V{part.itemsize * rows}").ravel()
        _, inverse, sizes = np.unique(keys, return_inverse=True, return_counts=True)
        shared = sizes > 1
        numbers = np.where(shared, first + np.cumsum(shared) - 1, -1)
        groups[band], first = numbers[inverse], first + int(shared.sum())
    return groups


class StoredShingles(Sequence[np.ndarray]):
    """The shingles of documents, read from disk one document at a time.

    Args:
        paths: .npy files, each the shingles of some documents one after another, uint32.
        lengths: for each file, the shingles of each of its documents.
    """

    def __init__(self, paths: Sequence[Path], lengths: Sequence[np.ndarray]) -> None:
        self._files = [np.load(path, mmap_mode="r") for path in paths]
        self._first = np.cumsum([0, *map(len, lengths)])  # document of each file
        self._starts = [np.concatenate([[0], np.cumsum(part)]) for part in lengths]

    def __len__(self) -> int:
        return int(self._first[-1])

    @overload
    def __getitem__(self, index: int) -> np.ndarray: ...
    @overload
    def __getitem__(self, index: slice) -> list[np.ndarray]: ...
    def __getitem__(self, index: int | slice) -> np.ndarray | list[np.ndarray]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        file = int(np.searchsorted(self._first, index, "right")) - 1
        start, stop = self._starts[file][index - self._first[file] :][:2]
        return np.asarray(self._files[file][start:stop])


def twins(heldout: Sequence[np.ndarray], training: Iterable[np.ndarray], threshold: float) -> Iterator[bool]:
    """Say of each training document whether a held-out one is similar to it; unlike `near_duplicates`, miss none.

    Args:
        heldout, training: shingles of documents; those of the held-out are held in memory, 8 bytes a shingle.
        threshold: in (0, 1).
    """
    sizes = np.array([len(hashes) for hashes in heldout], np.int64)
    values = np.concatenate([*heldout, np.empty(0, np.uint32)])
    order = np.argsort(values, kind="stable")
    values, owners = values[order], np.repeat(np.arange(len(sizes), dtype=np.int32), sizes)[order]
    for hashes in training:
        left, right = np.searchsorted(values, hashes), np.searchsorted(values, hashes, "right")
        if (right > left).sum() < threshold * len(hashes):  # all held-out documents together do not hold enough of it
            yield False
            continue
        sharing = np.concatenate([owners[a:b] for a, b in zip(left.tolist(), right.tolist(), strict=True)])
        shared = np.bincount(sharing, minlength=len(sizes))
        yield bool((shared >= threshold * (sizes + len(hashes) - shared)).any())
