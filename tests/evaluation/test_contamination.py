"""N-grams that tasks share with training text, held against sets of tuples of words."""

from collections.abc import Iterator, Sequence

import numpy as np
import pytest

from glm_jax.data.corpora.deduplicate import units
from glm_jax.evaluation import contamination
from glm_jax.evaluation.contamination import Contamination, Search
from tests.evaluation import toy


def words(*numbers: int) -> str:
    return " ".join(f"w{number}" for number in numbers)


def test_units() -> None:
    assert units("Don't — stop! ２ 天下 3.5") == ["don", "t", "stop", "２", "天", "下", "3", "5"]


def test_by_hand() -> None:
    """The first item has the 13-grams from w1, w2 and w3, of which training text has the second."""
    items = [[words(*range(1, 16))], [words(*range(20, 33))], [words(*range(40, 53)), words(*range(60, 73))]]
    search = Search([items, [["天下大势，分久必合，合久必分。"]], []])
    search.see("x W2, w3; W4 " + words(*range(5, 15)).upper() + "! w16 w20")  # w2 to w14
    search.see(words(*range(20, 32)))  # 12 units of the second item
    search.see(words(*range(60, 73)))
    assert search.counts() == [
        Contamination(13, 3, 2, 6, 2),
        Contamination(12, 1, 0, 1, 0),
        Contamination(8, 0, 0, 0, 0),
    ]
    search.see("话说天下大势，分久必合，\n合久必分")
    assert search.counts()[1] == Contamination(12, 1, 1, 1, 1)


@pytest.mark.parametrize("lengths, size", [([20] * 100, 13), ([10] * 6 + [20] * 94, 10), ([10] * 4 + [20] * 96, 13),
                                           ([3] * 50 + [20] * 50, 8)])  # fmt: skip
def test_short_items_have_shorter_ngrams(lengths: Sequence[int], size: int) -> None:
    search = Search([[[words(*range(length))] for length in lengths]])
    (found,) = search.counts()
    assert found == Contamination(
        size, sum(n >= size for n in lengths), 0, sum(max(n - size + 1, 0) for n in lengths), 0
    )


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    found = text.split()
    return {tuple(found[place : place + size]) for place in range(len(found) - size + 1)}


def test_against_sets() -> None:
    """Four words, so that runs of 8 and more often repeat; training texts have a word that no item has."""
    generator = np.random.default_rng(0)

    def text(length: int, known: int) -> str:
        return words(*generator.choice(known, length, p=[0.7, *[0.3 / (known - 1)] * (known - 1)]))

    files = [[[text(size, 4)] for _ in range(30)] for size in (9, 12, 30)]
    training = [text(200, 5) for _ in range(40)]
    search = Search(files)
    for one in training:
        search.see(one)
    for items, found in zip(files, search.counts(), strict=True):
        seen = set[tuple[str, ...]]().union(*(grams(one, found.size) for one in training))
        held = [grams(one, found.size) for (one,) in items]
        hits = [len(one & seen) for one in held]
        assert found == Contamination(found.size, 30, sum(map(bool, hits)), sum(map(len, held)), sum(hits))
        assert 0 < found.found_ngrams < found.ngrams


class Documents:
    """Training text in bytes, as shards have it."""

    def __init__(self, *texts: str) -> None:
        self._texts = [np.append(toy.Bytes().encode(text), toy.Bytes.eos) for text in texts]
        self.lengths = np.array([len(text) for text in self._texts])

    def __len__(self) -> int:
        return len(self._texts)

    def __getitem__(self, index: int, /) -> np.ndarray:
        return self._texts[index]


def test_documents_are_read_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(contamination, "TOGETHER", 2)
    search = Search([[[words(*range(13))]]])
    halves = words(*range(7)), words(*range(7, 13))  # no n-gram crosses documents
    steps: Iterator[tuple[int, int]] = contamination.scan(search, [Documents("a", *halves), Documents()], toy.Bytes())
    assert list(steps) == [(2, 2 + len(halves[0]) + 1), (1, len(halves[1]) + 1)]
    assert search.counts()[0].found_items == 0
    list(contamination.scan(search, [Documents("x " + " ".join(halves))], toy.Bytes()))
    assert search.counts() == [Contamination(13, 1, 1, 1, 1)]
