"""Near duplicates: what is found, what is not, and what it takes, against sets of words counted by hand."""

import json
import random
import tracemalloc
from pathlib import Path

import numpy as np
import pytest
from texts import chinese, english

from glm_jax.data.corpora import corpus, deduplicate
from glm_jax.data.corpora.build import Workers
from glm_jax.data.corpora.corpus import Input, read_documents
from glm_jax.data.corpora.deduplicate import (
    StoredShingles,
    bands,
    digest_of,
    distinct,
    near_duplicates,
    shingles,
    signature,
    twins,
)
from glm_jax.data.corpora.files import Found

THRESHOLD = 0.8


def triples(text: str) -> set[tuple[str, ...]]:
    words = text.split()
    return {tuple(words[start : start + 3]) for start in range(len(words) - 2)}


def jaccard(first: str, second: str) -> float:
    """The similarity of two texts of plain words, counted without hashes."""
    one, two = triples(first), triples(second)
    return len(one & two) / len(one | two)


def pairs(low: float, high: float, count: int) -> list[tuple[str, str]]:
    """Make texts in pairs of a similarity in [low, high): some words of the second are others."""
    source, made = random.Random(0), []
    while len(made) < count:
        words = [f"w{source.randrange(10**6)}" for _ in range(source.randrange(60, 300))]
        changed = list(words)
        for place in source.sample(range(len(words)), source.randrange(1, len(words) // 8)):
            changed[place] = f"w{source.randrange(10**6)}"
        if low <= jaccard(" ".join(words), " ".join(changed)) < high:
            made.append((" ".join(words), " ".join(changed)))
    return made


def near(texts: list[str], threshold: float = THRESHOLD) -> np.ndarray:
    hashes = [shingles(text) for text in texts]
    return near_duplicates(np.array([signature(own) for own in hashes]), hashes, threshold)


@pytest.mark.parametrize("low, high, rate", [(0.8, 0.85, 0.9), (0.85, 0.9, 0.97), (0.9, 1.0, 0.99)])
def test_pairs_from_the_threshold_on_are_found(low: float, high: float, rate: float) -> None:
    made = pairs(low, high, 300)
    found = near([text for pair in made for text in pair])
    assert not found[::2].any() and found[1::2].mean() >= rate


def test_pairs_below_the_threshold_stay() -> None:
    assert not near([text for pair in pairs(0.7, 0.8, 300) for text in pair]).any()


@pytest.mark.parametrize("threshold", [0.3, 0.5, 0.8, 0.95])
def test_bands_find_pairs_at_the_threshold(threshold: float) -> None:
    count, rows = bands(threshold)
    assert count * rows <= deduplicate.PERMUTATIONS
    trials = np.random.default_rng(0).random((4000, count, rows)) < threshold  # whether two signatures agree in a row
    assert trials.all(2).any(1).mean() > 0.95


def test_signatures_agree_as_often_as_texts_are_similar() -> None:
    made = pairs(0.5, 0.9, 100)
    errors = [
        (signature(shingles(first)) == signature(shingles(second))).mean() - jaccard(first, second)
        for first, second in made
    ]
    assert abs(np.mean(errors)) < 0.015 and np.std(errors) < 0.05


@pytest.mark.parametrize("make", [english, chinese])
def test_near_duplicates(make) -> None:
    texts = [make(seed, 300) for seed in range(20)]
    changed = [text[:-9] + "Changed." for text in texts[:5]]
    far = [text[: len(text) // 3] + make(seed + 100, 300) for seed, text in enumerate(texts[5:10])]
    assert near([*texts, *changed, *far]).tolist() == [False] * 20 + [True] * 5 + [False] * 5


def test_a_duplicate_of_a_duplicate_stays_if_it_is_far_from_what_is_kept() -> None:
    words = [f"w{number}" for number in range(100)]
    chain = [" ".join(words[start : start + 80]) for start in (0, 8, 16)]  # neighbours 70 of 86, ends 62 of 94
    assert jaccard(chain[0], chain[1]) > THRESHOLD > jaccard(chain[0], chain[2])
    assert near(chain).tolist() == [False, True, False]


def test_no_twin_is_missed_between_the_sides() -> None:
    sides = list(zip(*(pairs(0.6, 1.0, 150) + pairs(0.79, 0.81, 30)), strict=True))
    expected = [any(jaccard(held, text) >= THRESHOLD for held in sides[0]) for text in sides[1]]
    assert 50 < sum(expected) < 150
    assert list(twins(list(map(shingles, sides[0])), map(shingles, sides[1]), THRESHOLD)) == expected
    assert list(twins([], map(shingles, sides[1][:3]), THRESHOLD)) == [False] * 3


def test_a_corpus_has_no_held_out_document_with_a_twin(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deduplicate, "FOUND", 0.2)  # let the search miss many pairs
    monkeypatch.setattr(corpus, "PART_BYTES", 20_000)
    made = pairs(0.8, 0.95, 60)
    assert near([text for pair in made for text in pair])[1::2].mean() < 0.8
    lines = "".join(json.dumps({"text": text}) + "\n" for pair in made for text in pair)
    (tmp_path / "texts.jsonl").write_text(lines, "utf-8")
    (tmp_path / "documents").mkdir()
    with Workers(1) as workers:
        given = Input(Found((tmp_path / "texts.jsonl",)), "jsonl")
        corpus.write_documents(tmp_path / "documents", given, 0.4, THRESHOLD, workers, strict=True, report=print)
    assert len(list((tmp_path / "documents").glob("part-*"))) > 2
    train, held = (list(read_documents(tmp_path / "documents", name)) for name in corpus.SPLITS)
    assert held and all(jaccard(one, two) < THRESHOLD for one in held for two in train)
    index = corpus.read_index(tmp_path / "documents")
    assert index["dropped"]["near"] == 120 - len(train) - len(held)


def test_a_document_takes_less_than_a_kilobyte() -> None:
    count = 4_000
    random_numbers = np.random.default_rng(0)
    hashes = [np.array([number], np.uint32) for number in range(100)] * (count // 100)
    tracemalloc.start()
    signatures = random_numbers.integers(0, 2**32, (count, deduplicate.PERMUTATIONS), np.uint32)
    signatures[::2] = signatures[1::2]
    near_duplicates(signatures, hashes, THRESHOLD)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak / count < deduplicate.BYTES_A_DOCUMENT


def test_the_need_for_memory_is_said_before_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(corpus, "WORTH_SAYING", 50_000)
    texts = [english(seed) for seed in range(100)]
    (tmp_path / "a").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    said: list[str] = []
    with Workers(1) as workers:
        given = Input(Found((tmp_path / "a",)), "jsonl", where="here")
        for threshold in (0.0, THRESHOLD):
            (tmp_path / str(threshold)).mkdir()
            corpus.write_documents(
                tmp_path / str(threshold), given, 0.1, threshold, workers, strict=True, report=said.append
            )
    (line,) = said
    assert line.startswith("here: about 10") and line.endswith(
        "documents; to find near duplicates takes about 0.0 GB of memory"
    )


def test_stored_shingles_are_those_of_the_documents(tmp_path: Path) -> None:
    parts = [[np.arange(3, dtype=np.uint32), np.arange(5, 6, dtype=np.uint32)], [], [np.arange(9, dtype=np.uint32)]]
    for number, part in enumerate(parts):
        np.save(tmp_path / f"{number}.npy", np.concatenate([np.empty(0, np.uint32), *part]))
    lengths = [np.array([len(own) for own in part], np.int64) for part in parts]
    stored = StoredShingles([tmp_path / f"{number}.npy" for number in range(3)], lengths)
    expected = [own.tolist() for part in parts for own in part]
    assert len(stored) == 3 and [own.tolist() for own in stored[:]] == expected
    assert [stored[place].tolist() for place in range(3)] == expected


def test_exact_duplicates_differ_in_whitespace_at_most() -> None:
    first, second = english(1), english(2)
    kept, dropped = distinct([first, second, first, first.replace(" ", "\n  "), second + "\n"])
    assert dropped == 3
    assert {" ".join(document.text.split()) for document in kept} == {first, second}


def test_the_kept_do_not_depend_on_the_order() -> None:
    texts = [english(seed, 100) for seed in range(30)]
    texts += [text.replace(" ", "  ") for text in texts[:4]]
    kept, dropped = distinct(texts)
    assert dropped == 4
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert distinct(iter(texts)) == (kept, dropped)
    assert [document.digest for document in kept] == sorted(digest_of(document.text) for document in kept)


def test_shingles() -> None:
    def same(first: str, second: str) -> bool:
        return shingles(first).tolist() == shingles(second).tolist()

    assert same("One two, three FOUR", "one TWO three\nfour!")
    assert len(shingles("one two three four")) == 2
    assert len(shingles("天下大势，分久")) == 4
    assert len(shingles("numpy天下")) == 1  # three units: a word and two characters
    assert not same("天下势", "天势下")
    assert not same("😀 😀", "--- ---")  # no words: the text itself
    assert len(shingles("")) == 1
