"""Rows of whole documents: none is cut, each comes once per epoch, and few places stay empty."""

import collections
from types import SimpleNamespace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import SPECIAL, Documents, build, check_row, equal

from glm_jax.config.data import OBJECTIVES, BlankOptions
from glm_jax.data.rows import packing
from glm_jax.data.rows.blanks import draw_lengths
from glm_jax.data.rows.packing import best_fit, by_number, cut_long
from glm_jax.data.rows.room import places
from glm_jax.errors import UserError

WHOLE = BlankOptions(whole_documents=True)


@given(st.lists(st.integers(1, 500), max_size=30), st.integers(4, 200))
@settings(deadline=None)
def test_pieces_cover_each_document_in_order(lengths, longest):
    pieces = cut_long(np.array(lengths, np.int64), longest)
    covered = collections.defaultdict(list)
    for document, start, stop in pieces.tolist():
        assert 1 <= stop - start <= longest
        covered[document] += range(start, stop)
    assert all(covered[document] == list(range(length)) for document, length in enumerate(lengths))
    fits = sum(length <= longest for length in lengths)
    assert sum(stop - start == lengths[document] for document, start, stop in pieces.tolist()) == fits


@given(st.lists(st.integers(1, 64), min_size=1, max_size=200), st.integers(0, 99))
@settings(deadline=None)
def test_best_fit_groups_every_item_once_and_overfills_nothing(sizes, seed):
    array = np.array(sizes)
    order, starts = best_fit(array, 64, seed)
    assert sorted(order.tolist()) == list(range(len(sizes))) and starts[0] == 0 and starts[-1] == len(sizes)
    filled = np.add.reduceat(array[order], starts[:-1])
    assert filled.max() <= 64 and (np.diff(starts) > 0).all()
    assert len(filled) == 1 or np.sort(filled)[:2].sum() > 64


def test_best_fit_takes_the_fullest_row_that_holds_an_item():
    sizes = np.array([3, 5, 4, 6])  # 6 and 5 start rows; 4 fits after either, and 6 is the fuller one
    order, starts = best_fit(sizes, 10, 0)
    assert [sorted(sizes[order[first:last]].tolist()) for first, last in zip(starts, starts[1:], strict=False)] == [
        [4, 6], [3, 5]
    ]  # fmt: skip


def test_best_fit_leaves_little_room():
    sizes = np.minimum(512, np.random.default_rng(0).lognormal(4.6, 0.8, 5000).astype(int) + 3)
    _, starts = best_fit(sizes, 2048, 1)
    assert sizes.sum() / (2048 * (len(starts) - 1)) > 0.995
    assert not (best_fit(sizes, 2048, 1)[0] == best_fit(sizes, 2048, 2)[0]).all()


def test_by_number():
    order, starts = by_number(10, 4, 3)
    assert starts.tolist() == [0, 4, 8, 10] and sorted(order.tolist()) == list(range(10))


@pytest.mark.parametrize("length", [5, 60, 400])
def test_places_hold_most_draws(length):
    room = places("mask", 400, WHOLE)[length]
    generator = np.random.default_rng(0)
    needed = np.array([length + 2 * len(draw_lengths(length, generator, WHOLE)) for _ in range(2000)])
    assert room >= length + 2 and (needed > room).mean() < 0.23
    assert room == 7 if length == 5 else (needed > room - 2).mean() > 0.2
    assert places("gmask", 400, WHOLE)[length] == length + 2


@given(
    st.lists(st.integers(1, 300), min_size=1, max_size=25), st.integers(0, 2**32), st.sampled_from([32, 64, 130]),
    st.sampled_from([{"mask": 1.0}, {"gmask": 1.0}, {"mask": 0.4, "gmask": 0.6}]),
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_document_comes_whole_and_once_an_epoch(lengths, seed, seq_length, objectives):
    documents = Documents(lengths)
    made = build({"en": documents}, seq_length=seq_length, objectives=objectives, seed=seed, options=WHOLE)
    rows = made.rows_per_epoch
    batch, texts = made.at(0, 2 * rows), collections.defaultdict(list)
    for row in range(2 * rows):
        texts[made.locate(row).epoch] += check_row(batch, row, WHOLE)
    for epoch in (0, 1):
        assert (np.sort(np.concatenate(texts[epoch])) == np.sort(documents.stream())).all()
    short = {int(documents[i][0]) for i in range(len(documents)) if lengths[i] <= seq_length // 2}
    whole = {int(text[0]): len(text) for text in texts[0]}
    for i in range(len(documents)):
        if int(documents[i][0]) in short - {SPECIAL.eos}:
            assert whole[int(documents[i][0])] == lengths[i]


def test_rows_are_dense_and_found_at_random():
    sizes = np.random.default_rng(1).integers(20, 160, 1500)
    made = build({"en": Documents(sizes)}, seq_length=512, objectives={"mask": 0.3, "gmask": 0.7}, options=WHOLE)
    batch = made.at(0, 120)
    assert (batch.segments > 0).mean() > 0.9
    for objective, share in (("mask", 0.95), ("gmask", 0.85)):
        rows = batch.objective == OBJECTIVES.index(objective)
        assert (batch.segments[rows] > 0).mean() > share
    again = build({"en": Documents(sizes)}, seq_length=512, options=WHOLE)
    assert equal(made.at(10**9, 4), again.at(10**9, 4))
    orders = [[made.locate(epoch * made.rows_per_epoch + row).start for row in range(30)] for epoch in (0, 1)]
    assert orders[0] != orders[1]


@pytest.mark.parametrize("prefix", [(), (8, 9)])
def test_no_row_overflows_where_both_its_texts_draw_more_than_they_reserve(prefix):
    """Two texts of 50 tokens and four spare places: the other text cannot use those that one has taken."""
    special = SimpleNamespace(**vars(SPECIAL) | {"prefix": prefix})
    options = BlankOptions(whole_documents=True, mask_ratio=0.3, mean_span=1.5)
    room = int(places("mask", 50, options)[50]) + len(prefix)
    documents = Documents([50] * 600)
    made = build({"en": documents}, None, 2 * room + 4, {"mask": 1.0}, special=special, options=options)
    segments = made.at(0, 300).segments  # [B, S]
    taken = np.array([np.bincount(row, minlength=3)[1:] for row in segments])  # [B, 2]
    assert taken.shape == (300, 2) and (taken[:, 0] > room).any() and (taken[:, 1] > room + 4).any()
    assert taken.sum(axis=1).max() <= 2 * room + 4


def test_blanks_depend_on_the_seed_where_the_text_does_not():
    first, second = (
        build({"en": Documents([40])}, seq_length=64, options=WHOLE, seed=seed).at(0, 8) for seed in (1, 2)
    )
    assert not equal(first, second)
    assert (np.diff(first.tokens, axis=0) != 0).any(axis=1).all()


def test_nothing_to_pack_and_quirks_beside_whole_documents_are_refused():
    empty = Documents([5])
    empty.lengths = np.zeros(0, np.int64)
    with pytest.raises(UserError, match="en holds no documents"):
        build({"en": empty}, options=WHOLE)
    with pytest.raises(ValueError, match="does not go with"):
        BlankOptions(whole_documents=True, cut_targets=True)
    assert packing.cut_long(np.zeros(0, np.int64), 5).shape == (0, 3)
