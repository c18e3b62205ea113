"""Find exact and near duplicates: which documents of a corpus to keep, whatever order they come in."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 128  # the estimate of a similarity is then within about 0.09 (two standard errors at 0.5)
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


def signature(text: str) -> np.ndarray:
    """Return the MinHash signature of a text's shingles: uint32 [PERMUTATIONS] (Broder 1997)."""
    sketch = MinHash(PERMUTATIONS, hashfunc=int, scheme=SCHEME)
    hashes = list(shingles(text))
    for start in range(0, len(hashes), BATCH):
        sketch.update_batch(hashes[start : start + BATCH])
    return sketch.hashvalues.astype(np.uint32)


def near_duplicates(signatures: Iterable[np.ndarray], threshold: float) -> Iterator[bool]:
    """Yield, for each document, whether it is similar to an earlier one that was not a near duplicate itself.

    Similar means an estimated Jaccard similarity of at least `threshold`, among the pairs that locality-sensitive
    hashing finds. With the documents in hash order, the answer does not depend on the order they were read in.

    Args:
        signatures: of the documents, in order. Those of kept documents are held in memory.
        threshold: in (0, 1).
    """
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    sketches: dict[int, MinHash] = {}
    for number, values in enumerate(signatures):
        sketch = MinHash(PERMUTATIONS, hashvalues=values, hashfunc=int, scheme=SCHEME)
        near = any(sketch.jaccard(sketches[other]) >= threshold for other in map(_number, index.query(sketch)))
        if not near:
            index.insert(number, sketch, check_duplication=False)
            sketches[number] = sketch
        yield near


def _number(key: object) -> int:
    assert isinstance(key, int)  # near_duplicates inserts numbers only
    return key


def shingles(text: str) -> set[int]:
    """Return the 32-bit hashes of each run of SHINGLE units (words or Chinese characters), ignoring case.

    A text with fewer units is one shingle. So is a text without letters or digits, taken whole.
    """
    units = _UNIT.findall(text.casefold()) or [text]
    runs = range(max(1, len(units) - SHINGLE + 1))
    return {zlib.crc32(" ".join(units[start : start + SHINGLE]).encode()) for start in runs}
