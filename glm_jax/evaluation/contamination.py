"""How much of a task's texts a run was trained on: the n-grams that both have (GPT-3, arXiv 2005.14165, appendix C).

An n-gram is a run of units: words, and single characters of scripts without spaces, without case and punctuation
(`deduplicate.units`). Its size is the 5th percentile of the lengths of a file's items, but 8 to 13 units. Only the
task's n-grams are held in memory, as 64-bit hashes; training text is read once, document by document.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.data.corpora.deduplicate import units
from glm_jax.data.rows.streams import Documents
from glm_jax.data.tokenizers.protocol import Tokenizer

SHORTEST, LONGEST = 8, 13  # units of an n-gram
PERCENTILE = 5  # of the items' units
TOGETHER = 256  # documents between two reports of progress
BASE = np.uint64(0x9E3779B97F4A7C15)  # of the polynomial that hashes n-grams; odd


class Contamination(NamedTuple):
    """What training text has of a file."""

    size: int  # units of an n-gram
    items: int  # with at least one n-gram
    found_items: int  # with at least one that training text has
    ngrams: int  # different ones of each item, over all items
    found_ngrams: int  # of these, those that training text has


class Search:
    """The n-grams of many files, and which of them the texts seen so far have."""

    def __init__(self, files: Iterable[Sequence[Sequence[str]]]) -> None:
        """Collect the n-grams of files, each of which has items of one or more texts."""
        self._numbers = dict[str, int]()  # of the units; all others have the number 0
        self._files = [self._collect(items) for items in files]
        sizes = sorted({size for size, _ in self._files})
        grams = {size: [hashes for other, items in self._files if other == size for hashes in items] for size in sizes}
        self._hashes = {size: np.unique(np.concatenate(some)) for size, some in grams.items() if any(map(len, some))}
        self._found = {size: np.zeros(len(hashes), bool) for size, hashes in self._hashes.items()}

    def _collect(self, items: Sequence[Sequence[str]]) -> tuple[int, list[np.ndarray]]:
        """Return the size of a file's n-grams, and those of each item: uint64, ascending, each once."""
        for text in itertools.chain.from_iterable(items):
            for unit in units(text):
                self._numbers.setdefault(unit, len(self._numbers) + 1)
        read = [[self._read(text) for text in texts] for texts in items]
        lengths = [max(map(len, texts), default=0) for texts in read]
        percentile = int(np.percentile(lengths, PERCENTILE)) if lengths else 0
        size = min(max(percentile, SHORTEST), LONGEST)
        none = np.zeros(0, np.uint64)
        return size, [np.unique(np.concatenate([none, *(ngrams(one, size) for one in texts)])) for texts in read]

    def _read(self, text: str) -> np.ndarray:
        """Return the numbers of a text's units: int64 [units]."""
        found = units(text)
        return np.fromiter(map(self._numbers.get, found, itertools.repeat(0)), np.int64, len(found))

    def see(self, text: str) -> None:
        """Take note of the n-grams of a training text."""
        numbers = self._read(text)
        for size, hashes in self._hashes.items():
            seen = ngrams(numbers, size)
            places = np.minimum(np.searchsorted(hashes, seen), len(hashes) - 1)
            self._found[size][places[hashes[places] == seen]] = True

    def counts(self) -> list[Contamination]:
        """Return what the texts seen so far have of each file."""
        return [self._count(size, items) for size, items in self._files]

    def _count(self, size: int, items: Sequence[np.ndarray]) -> Contamination:
        held = [hashes for hashes in items if len(hashes)]
        hits = [int(self._found[size][np.searchsorted(self._hashes[size], hashes)].sum()) for hashes in held]
        return Contamination(size, len(held), sum(map(bool, hits)), sum(map(len, held)), sum(hits))


def ngrams(numbers: np.ndarray, size: int) -> np.ndarray:
    """Return the hashes of all runs of `size` units: uint64 [units - size + 1], or none."""
    count = max(len(numbers) - size + 1, 0)
    mixed, hashes = _mixed(numbers.astype(np.uint64)), np.zeros(count, np.uint64)
    for place in range(size):
        hashes = hashes * BASE + mixed[place : place + count]
    return hashes


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """Return uint64 numbers whose bits all depend on those of the given ones (the finaliser of splitmix64)."""
    mixed = numbers * BASE
    mixed = (mixed ^ (mixed >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return mixed ^ (mixed >> np.uint64(31))


def scan(search: Search, sources: Sequence[Documents], tokenizer: Tokenizer) -> Iterator[tuple[int, int]]:
    """Look for the n-grams in all documents, and yield how many documents and tokens were read, now and then."""
    read = tokens = 0
    for source in sources:
        for place in range(len(source)):
            document = source[place]
            search.see(tokenizer.decode(document.tolist()))
            read, tokens = read + 1, tokens + len(document)
            if read == TOGETHER:
                yield read, tokens
                read = tokens = 0
    if read:
        yield read, tokens
