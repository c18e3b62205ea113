"""Exact and near duplicates: which documents of a corpus to keep, whatever order they come in."""

from __future__ import annotations

import hashlib
import re
import zlib
from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass

from datasketch import MinHash, MinHashLSH

PERMUTATIONS = 128  # the estimate of a similarity is then within about 0.09 (two standard errors at 0.5)
SHINGLE = 3  # units a shingle
BATCH = 1 << 14  # shingles permuted at once, so that a huge document needs no huge array

# A word, or one character of scripts without spaces: kana, Han with extensions and compatibility forms.
_UNIT = re.compile("[\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]|"
                   "[^\\W\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff]+")  # fmt: skip


@dataclass(frozen=True)
class Kept:
    """A document that stays: its text and the sha256 of that text, which orders and splits a corpus."""

    digest: bytes
    text: str


@dataclass
class Dropped:
    """Counts of what was left out."""

    exact: int = 0
    near: int = 0


def deduplicate(texts: Iterable[str], threshold: float) -> tuple[list[Kept], Dropped]:
    """Keep one of each set of equal or similar documents: the one whose text hashes lowest.

    Equal means equal but for whitespace. Similar means an estimated Jaccard similarity of their shingles of
    at least `threshold` (MinHash signatures; Broder 1997), among the pairs that locality-sensitive hashing
    finds. The result does not depend on the order of `texts`.

    Args:
        texts: documents; their text is held in memory once.
        threshold: in [0, 1); 0 drops exact duplicates only.

    Returns:
        The kept documents in the order of their digests, which shuffles them, and the counts of the others.
    """
    dropped = Dropped()
    first: dict[bytes, Kept] = {}
    for text in texts:
        document = Kept(hashlib.sha256(text.encode()).digest(), text)
        key = hashlib.sha256(" ".join(text.split()).encode()).digest()
        other = first.setdefault(key, document)
        if other is not document:
            dropped.exact += 1
            first[key] = min(document, other, key=lambda kept: kept.digest)
    documents = sorted(first.values(), key=lambda kept: kept.digest)
    if threshold == 0:
        return documents, dropped
    kept = list(_distinct(documents, threshold))
    dropped.near = len(documents) - len(kept)
    return kept, dropped


def _distinct(documents: Iterable[Kept], threshold: float) -> Iterator[Kept]:
    """Yield each document that is not similar to one yielded before."""
    index = MinHashLSH(threshold=threshold, num_perm=PERMUTATIONS)
    signatures: dict[Hashable, MinHash] = {}
    for document in documents:
        signature = MinHash(PERMUTATIONS, hashfunc=int, scheme="affine32")
        hashes = list(shingles(document.text))
        for start in range(0, len(hashes), BATCH):
            signature.update_batch(hashes[start : start + BATCH])
        candidates = index.query(signature)
        if any(signature.jaccard(signatures[candidate]) >= threshold for candidate in candidates):
            continue
        index.insert(document.digest, signature, check_duplication=False)
        signatures[document.digest] = signature
        yield document


def shingles(text: str) -> set[int]:
    """Give the 32-bit hashes of each run of SHINGLE units (words, or characters of Chinese), case aside.

    A text with fewer units is one shingle; one without any letter or digit stands for itself.
    """
    units = _UNIT.findall(text.casefold()) or [text]
    runs = range(max(1, len(units) - SHINGLE + 1))
    return {zlib.crc32(" ".join(units[start : start + SHINGLE]).encode()) for start in runs}
