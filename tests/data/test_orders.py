"""What depends on the seed, what it depends on besides, and that no two draws share random bits."""

import hashlib
import itertools
from typing import Any

import numpy as np
import pytest
from rows import FIRST, SPECIAL, Documents, build, check_row

from glm_jax.config.data import BlankOptions
from glm_jax.data.rows.packing import Packing, best_fit, by_number
from glm_jax.data.rows.streams import Stream
from glm_jax.errors import UserError

WHOLE = BlankOptions(whole_documents=True)
ONE = {"gmask": 1.0}


class Prompts(Documents):
    """Instruction documents: a unique token, [MASK], a unique answer, eos."""

    def __init__(self, count: int) -> None:
        self.lengths = np.full(count, 4, np.int64)
        self._documents = [
            np.array([FIRST + 2 * i, SPECIAL.mask, FIRST + 2 * i + 1, SPECIAL.eos]) for i in range(count)
        ]


def orders(name: str, seed: int, options: BlankOptions) -> list[list[tuple[int, int]]]:
    """Return, for each of three epochs, where each row's text starts in the epoch, and its first token."""
    made = build({name: Documents([39] * 1500)}, seq_length=64, objectives=ONE, seed=seed, options=options)
    found: list[list[tuple[int, int]]] = [[] for _ in range(3)]
    for number in itertools.count():
        row = made.locate(number)
        if row.epoch == 3:
            return found
        found[row.epoch].append((row.start, int(made.text(row)[0])))
    raise AssertionError


@pytest.mark.parametrize("options", [BlankOptions(), WHOLE])
def test_rows_come_in_another_order_in_each_epoch_source_and_seed(options: BlankOptions) -> None:
    found = [order for name, seed in (("en", 7), ("en", 8), ("zh", 7)) for order in orders(name, seed, options)]
    assert len(found) == 9 and min(map(len, found)) > 100
    for left, right in itertools.combinations(found, 2):
        for part in (0, 1):  # the order of the places, and that of the text
            assert np.mean([a[part] == b[part] for a, b in zip(left, right, strict=False)]) < 0.1
    for order in found:  # rows are not in the order of places either
        assert np.mean(np.diff([start for start, _ in order]) > 0) < 0.8
    assert orders("en", 7, options) == found[:3]


def test_groups_come_in_an_order_of_the_seed_the_source_and_the_epoch() -> None:
    pieces, groups = np.array([[i, 0, 4] for i in range(64)]), (np.arange(64), np.arange(65))

    def order(name: str, seed: int, epoch: int) -> tuple[int, ...]:
        made = Packing(name, Prompts(64), pieces, groups, seed)
        located = [made.locate(64 * epoch + i) for i in range(64)]
        assert {at for at, _, _ in located} == {epoch} and all(stop == start + 1 for _, start, stop in located)
        return tuple(start for _, start, _ in located)

    found = {order(*key) for key in itertools.product(("en", "zh"), (0, 1), (0, 1))}
    assert len(found) == 8 and all(sorted(starts) == list(range(64)) for starts in found)
    assert all(np.mean(np.diff(starts) > 0) < 0.75 for starts in found)  # half, with a deviation of 0.037


def test_epochs_of_a_stream_begin_at_different_tokens() -> None:
    """Where an epoch begins decides where its rows are cut; it is uniform over the stream."""
    found = []
    for name, seed in itertools.product(("en", "zh"), (1, 2)):
        stream = Stream(name, Documents([1000]), {"gmask": 30}, seed)
        first = [int(stream.read(epoch, 0, 1)[0]) for epoch in range(200)]
        found += [999 if token == SPECIAL.eos else token - FIRST for token in first]
    assert len(set(found)) > 450  # of 800 draws among 1,000: 551 are expected, with a deviation of 10
    counts = np.bincount(np.array(found) * 8 // 1000, minlength=8)
    assert ((counts - 100) ** 2 / 100).sum() < 24.3  # 99.9% point of chi-square with 7 degrees of freedom


def test_a_source_needs_sixteen_tokens() -> None:
    assert build({"en": Documents([9, 7])}).rows_per_epoch == 1
    with pytest.raises(UserError, match="source en holds 15 tokens"):
        build({"en": Documents([9, 6])})


def test_a_long_stream_is_read_at_sixteen_blocks_side_by_side() -> None:
    """Neighbouring rows come from 16 blocks in turn, then from the same again; another number changes the order."""
    made = build({"en": Documents([1000] * 400)}, seq_length=64, objectives=ONE)
    located = [made.locate(row) for row in range(64)]
    starts = [row.start for row in located]
    assert [row.start for row in located[16:32]] == [row.stop for row in located[:16]]
    assert starts[32:48] == [row.stop for row in located[16:32]] and min(np.diff(np.sort(starts[:16]))) > 300


def test_blocks_have_the_number_of_rows_that_wastes_least() -> None:
    """8 rows of 62 tokens are 496, as are 10 of 50 less 4: no other number from 6 to 16 fits better."""
    stream = Stream("en", Documents([1000] * 400), {"mask": 50, "gmask": 62}, 1)
    assert stream.blocks == 807 and stream.rows == {"mask": 10, "gmask": 8}  # 400,000 / 496 = 806.5
    assert stream.together == 16 and stream.tokens == 400_000


def test_a_seed_decides_which_items_share_a_row() -> None:
    equal = np.full(60, 16)
    for group in (lambda seed: best_fit(equal, 64, seed), lambda seed: by_number(60, 4, seed)):
        together = [
            {frozenset(order[4 * row : 4 * row + 4].tolist()) for row in range(15)} for order, _ in map(group, range(3))
        ]
        assert all(len(left & right) < 3 for left, right in itertools.combinations(together, 2))
        assert all(abs(np.mean(sorted(row)) - 29.5) < 29 for row in together[0])
        assert frozenset(range(4)) not in together[0] | together[1] | together[2]


@pytest.mark.parametrize("options", [BlankOptions(), WHOLE])
def test_prompts_share_rows_and_come_by_chance(options: BlankOptions) -> None:
    places: list[list[int]] = []

    def rows(seed: int) -> list[tuple[int, ...]]:
        weights, shares = {"en": 1.0, "tasks": 1.0}, {"instruction": 1.0, "gmask": 0.0}
        sources: Any = {"en": Documents([100])}
        made = build(sources, weights, 64, shares, seed, options=options, instructions={"tasks": Prompts(256)})
        batch = made.at(0, 2 * made.rows_per_epoch)
        places.append([made.locate(row).start for row in range(len(batch.tokens))])
        texts = [check_row(batch, row, options) for row in range(len(batch.tokens))]
        return [tuple(int(text[0] - FIRST) // 2 for text in row) for row in texts]

    first, second = rows(1), rows(2)
    assert places[0] != places[1]
    half = len(first) // 2
    assert sorted(itertools.chain(*first[:half])) == list(range(256)) == sorted(itertools.chain(*first[half:]))
    assert first[:half] != first[half:] and set(first[:half]) == set(first[half:])  # grouped once, reordered
    assert not set(first) & set(second) and first == rows(1)
    assert sum(list(row) == sorted(row) for row in first) < 0.5 * len(first)


def test_no_two_rows_and_no_two_purposes_share_random_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[int, ...]] = []
    philox = np.random.Philox

    def record(key: np.ndarray) -> np.random.Philox:
        keys.append(tuple(key.tolist()))
        return philox(key=key)

    monkeypatch.setattr(np.random, "Philox", record)
    options = BlankOptions(replacement=True)
    for seed, numbers in itertools.product((0, 1, 2**64 - 1), ((0, 40), (2**32, 40), (2**48 - 50, 40))):
        build(seed=seed, options=options).at(*numbers)
    assert len(keys) == len(set(keys)) == 3 * 3 * 40 * 2  # the window and the blanks of each row


def test_blanks_of_equal_texts_differ_from_row_to_row() -> None:
    """Every row holds the same document, so whatever differs between rows is drawn."""
    made = build({"en": Documents([60])}, seq_length=96, objectives={"mask": 1.0}, options=WHOLE)
    rows = {row.tobytes() for row in made.at(0, 300).tokens} | {row.tobytes() for row in made.at(2**32, 300).tokens}
    assert len(rows) == 600


def digest(batch: dict[str, np.ndarray]) -> str:
    content = b"".join(name.encode() + np.ascontiguousarray(batch[name]).tobytes() for name in sorted(batch))
    return hashlib.sha256(content).hexdigest()[:16]


GOLDENS: list[tuple[dict[str, Any], str]] = [
    ({}, "7e45e051021495ec"),
    (
        {"options": BlankOptions(mask_segments=2, gmask_eop=False, single_span_prob=0.2, short_seq_prob=0.3)},
        "edf05c47ad64b31b",
    ),
    (
        {"options": BlankOptions(cut_targets=True, replacement=True, short_seq_prob=0.3, shortest_seq=4)},
        "606e076072007cc9",
    ),
    (
        {"options": BlankOptions(gmask_infill_prob=0.5, two_streams=True, block_mask_prob=0.2, block_mask_token=8)},
        "d4e68699c071c1b7",
    ),
    ({"options": WHOLE}, "fd127ffedcce31a8"),
    ({"objectives": {"mask": 0.2, "smask": 0.3, "instruction": 0.5}}, "92c694fbe4b5613b"),
]


@pytest.mark.parametrize("changes, expected", GOLDENS)
def test_resumed_runs_read_the_rows_that_older_versions_would_have_read(changes: dict[str, Any], expected: str) -> None:
    """A run that resumes under a newer version must not read some text twice and miss other text.

    The digests are of the rows as they were when this was written. Whoever changes them on purpose must warn those with
    unfinished runs.
    """
    sources: Any = {"en": Documents([50, 3, 400, 1000, 7] * 3), "zh": Documents([600, 150], 20_000)}
    ends = np.arange(30_000) % 13 == 0
    weights = {"en": 2.0, "zh": 1.0, "tasks": 1.0}
    more: dict[str, Any] = {"sentence_ends": ends, "instructions": {"tasks": Prompts(30)}, **changes}
    made = build(sources, weights, 64, more.pop("objectives", {"mask": 0.3, "gmask": 0.7}), 7, **more)
    batches = [made.at(0, 200), made.at(12_345_678, 20)]
    assert (
        digest({f"{name}{i}": array for i, batch in enumerate(batches) for name, array in batch._asdict().items()})
        == expected
    )
