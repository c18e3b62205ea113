"""Rows and batches: exact epochs, any access order, and the batch contract."""

import collections
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from rows import FIRST, SHARES, SPECIAL, Documents, build, check_row, equal, least_cpu_seconds

from glm_jax.config.data import OBJECTIVES, BlankOptions
from glm_jax.data.rows import batches
from glm_jax.data.rows.rows import Rows
from glm_jax.data.rows.streams import shuffled
from glm_jax.errors import UserError

option_sets = st.sampled_from(
    [
        BlankOptions(),
        BlankOptions(mask_segments=2, gmask_eop=False),
        BlankOptions(short_seq_prob=0.3, single_span_prob=0.2, mask_segments=3, gmask_segments=2),
    ]
)


@given(
    st.lists(st.integers(1, 150), min_size=1, max_size=8).filter(lambda lengths: sum(lengths) >= 16),
    st.integers(0, 2**32), st.sampled_from([16, 33, 64, 130]), st.floats(0.2, 0.8), option_sets,
)  # fmt: skip
@settings(max_examples=25, deadline=None)
def test_every_token_is_read_exactly_once_an_epoch(lengths, seed, seq_length, share, options):
    """Rebuild the text of every row from its batch and group it by epoch, while shares change."""
    seq_length = max(seq_length, 16 * max(options.mask_segments, options.gmask_segments))
    documents = Documents(lengths)
    history = [(0, {"mask": share, "gmask": 1 - share}), (40, {"mask": 1 - share, "gmask": share})]
    made = build({"en": documents}, seq_length=seq_length, objectives=history, seed=seed, options=options)
    read = collections.defaultdict(list)
    rows = 3 * made.rows_per_epoch + 100
    batch = made.at(0, rows)
    for row in range(rows):
        read[made.locate(row).epoch].extend(np.concatenate(check_row(batch, row, options)))
    stream = np.sort(documents.stream())
    for epoch in (0, 1):
        assert (np.sort(read[epoch]) == stream).all()
    for text in read.values():  # the last epochs are read in part, and nothing twice
        numbers, counts = np.unique(text, return_counts=True)
        assert (counts[numbers >= FIRST] == 1).all() and np.isin(numbers, stream).all()


def test_epochs_are_complete_across_changed_weights_and_objectives():
    """Two sources and ramps of both kinds. Batch sizes do not matter, because only rows are numbered."""
    sources = {"en": Documents([50, 3, 400, 1000, 7] * 9), "zh": Documents([600, 150], 50_000)}
    weights = [(0, {"en": 1.0, "zh": 1.0}), (300, {"en": 1.0, "zh": 3.0}), (700, {"en": 4.0, "zh": 1.0})]
    objectives = [(0, {"mask": 1.0}), (200, {"mask": 1.0, "gmask": 1.0}), (500, {"mask": 1.0, "gmask": 9.0})]
    made = build(sources, weights, objectives=objectives)
    spans = collections.defaultdict(list)
    for number in range(4000):
        row = made.locate(number)
        spans[row.source, row.epoch].append((row.start, row.stop))
    complete = 0
    for (source, epoch), pieces in spans.items():
        pieces.sort()
        length = sum(sources[made.sources[source]].lengths)
        if epoch <= {0: 2, 1: 30}[source]:
            assert pieces[0][0] == 0 and pieces[-1][1] == length
            assert [stop for _, stop in pieces[:-1]] == [start for start, _ in pieces[1:]]
            complete += 1
    assert complete == 3 + 31


def test_the_same_text_meets_other_objectives_and_cuts_in_other_epochs():
    made = build({"en": Documents([3000])})
    met = {epoch: np.full(3100, -1) for epoch in (0, 1)}
    cuts = {epoch: set() for epoch in (0, 1)}
    for number in range(400):
        row = made.locate(number)
        if row.epoch in met:
            text = made.text(row)
            met[row.epoch][text] = OBJECTIVES.index(row.objective)
            cuts[row.epoch].add(int(text[0]))
    assert len(cuts[0] & cuts[1]) < 0.5 * len(cuts[0])
    both = (met[0] >= 0) & (met[1] >= 0)
    assert both.mean() > 0.9 and 0.2 < (met[0] != met[1])[both].mean() < 0.7


@given(st.integers(0, 10**7), st.integers(1, 24), st.lists(st.integers(1, 24), max_size=3), st.randoms())
@settings(max_examples=25, deadline=None)
def test_a_batch_is_the_same_in_any_order_and_for_any_split(first, rows, cuts, random):
    made, again = build(), build()
    whole = made.at(first, rows)
    edges = sorted({0, rows, *(cut % rows for cut in cuts)})
    parts = list(zip(edges, edges[1:], strict=False))
    random.shuffle(parts)
    pieces = {start: again.at(first + start, stop - start) for start, stop in parts}
    joined = [np.concatenate(arrays) for arrays in zip(*(pieces[start] for start in sorted(pieces)), strict=True)]
    assert equal(whole, joined)


def test_steps_number_their_rows_by_batch():
    made = build()
    assert equal(made.batch_at(3, 8), made.at(24, 8))


def test_row_ten_million_costs_what_row_ten_costs():
    made = build()
    early, late = least_cpu_seconds(lambda part: made.at(8 * part + 2, 8), 1, 1_250_000)
    assert late < 2 * early


@pytest.mark.parametrize("threads", [0, 3])
def test_prefetched_batches_are_the_same_in_order(threads):
    made = build()
    ahead = made.prefetched(40, 8, threads=threads)
    for step in range(10):
        assert equal(next(ahead), made.at(40 + 8 * step, 8))
    ahead.close()


def test_counts_of_sources_and_objectives_are_exact():
    made = build(weights={"en": 1.0, "zh": 3.0})
    batch = made.at(0, 400)
    for source, share in enumerate((0.25, 0.75)):
        for objective, part in SHARES.items():
            drawn = (batch.source == source) & (batch.objective == OBJECTIVES.index(objective))
            assert abs(drawn.sum() - 400 * share * part) < 4
    assert ((batch.tokens > 5000).any(1) == (batch.source == 1)).mean() > 0.97


def test_a_later_change_of_weights_leaves_earlier_rows_alone():
    sources = {"en": Documents([900]), "zh": Documents([700], 5000), "ja": Documents([500], 9000)}
    old = build(sources, {"en": 1.0, "zh": 1.0})
    new = build(
        sources, [(0, {"en": 1.0, "zh": 1.0}), (100, {"en": 1.0, "zh": 1.0}), (100, {"ja": 1.0})],
        objectives=[(0, SHARES), (100, SHARES), (100, {"mask": 1.0, "gmask": 1.0})],
    )  # fmt: skip
    assert equal(old.at(0, 100), new.at(0, 100))
    assert (new.at(100, 20).source == 2).all()


def test_seeds_differ():
    for seed in (1, 2**64 - 2):
        assert not equal(build(seed=seed).at(0, 8), build(seed=seed + 1).at(0, 8))


def test_causal_contexts_change_what_tokens_see_and_nothing_else():
    plain, causal = (build(options=BlankOptions(causal_context=causal)).at(0, 16) for causal in (False, True))
    assert plain.context.any(1).all() and not causal.context.any()
    assert equal(plain._replace(context=causal.context), causal)


def test_two_streams():
    options = BlankOptions(two_streams=True)
    batch = build(options=options).at(0, 16)
    assert batch.positions.shape == (16, 2, 32)
    plain = build().at(0, 16)
    assert (batch.tokens == plain.tokens).all()
    for b in range(16):
        target = batch.loss_mask[b] > 0
        heads = batch.tokens[b] == SPECIAL.sop
        assert (batch.positions[b, 1][~target] == 0).all()
        assert (batch.positions[b, 1][heads] == 1).all()
        blanks = np.unique(batch.positions[b, 0][target])
        assert np.isin(batch.tokens[b][blanks], (SPECIAL.mask, SPECIAL.gmask)).all()


@pytest.mark.parametrize("options", [BlankOptions(mask_segments=2), BlankOptions(whole_documents=True)])
def test_each_context_begins_in_the_prefix(options):
    """Without their prefixes, the rows keep the contract, and read each token once an epoch."""
    documents = Documents([9, 3, 140, 25, 7, 11, 30, 395])  # 620 tokens: ten rows of 62, had they no prefix
    special: Any = SimpleNamespace(**vars(SPECIAL) | {"prefix": (8, 9)})
    made = build({"en": documents}, None, 64, {"mask": 0.5, "gmask": 0.5}, special=special, options=options)
    rows = made.rows_per_epoch
    batch, texts = made.at(0, rows), []
    for b in range(rows):
        segments, tokens = batch.segments[b], batch.tokens[b]
        starts = [int(np.argmax(segments == segment)) for segment in range(1, segments.max() + 1)]
        for start in starts:
            assert tokens[start : start + 2].tolist() == [8, 9] and batch.context[b, start : start + 2].all()
            assert batch.positions[b, start : start + 2].tolist() == [0, 1]
        dropped = [*starts, *(start + 1 for start in starts)]
        assert len(dropped) == np.isin(tokens, [8, 9]).sum()
        plain: Any = Rows(*(array[b : b + 1] for array in batch))
        plain = Rows(*(np.delete(array, dropped, axis=1) for array in plain[:6]), *plain[6:])
        plain = plain._replace(positions=plain.positions - 2 * (plain.segments > 0))
        texts += check_row(plain, 0, options)
    read, counts = np.unique(np.concatenate(texts), return_counts=True)
    assert (counts[read >= FIRST] == 1).all()
    if options.whole_documents:
        assert (np.sort(np.concatenate(texts)) == np.sort(documents.stream())).all()


def test_paper_segments():
    """4 x 512 for [MASK], 1 x 2,048 for [gMASK]; positions restart and no segment exceeds its share."""
    options = BlankOptions(mask_segments=4)
    made = build({"en": Documents([5000] * 120)}, seq_length=2048, options=options)
    batch = made.at(0, 40)
    for b in range(40):
        check_row(batch, b, options)
        sizes = np.bincount(batch.segments[b])[1:]
        if OBJECTIVES[batch.objective[b]] == "mask":
            assert len(sizes) == 4 and sizes.max() <= 512 and sizes.min() > 440
        else:
            assert len(sizes) == 1 and sizes[0] > 2000


def test_smask_rows():
    documents = Documents([300] * 10)
    ends = np.zeros(FIRST + 4000, bool)
    ends[::13] = True
    made = build({"en": documents}, objectives={"smask": 1.0}, seq_length=128, sentence_ends=ends)
    batch = made.at(0, 16)
    for b in range(16):
        (text,) = check_row(batch, b, BlankOptions())
        assert (text == made.text(made.locate(b))).all()
    with pytest.raises(UserError, match="sentence_ends"):
        build({"en": documents}, objectives={"smask": 1.0})


def test_reference_quirks():
    """500 tokens in 512 places, targets cut; rows drawn with replacement miss some text and repeat some."""
    options = BlankOptions(mask_segments=4, gmask_eop=False, cut_targets=True, replacement=True)
    made = build({"en": Documents([20_000] * 10)}, seq_length=2048, options=options)
    batch = made.at(0, 60)
    for b in range(60):
        assert np.bincount(batch.segments[b])[1:].max() <= (2048 if batch.objective[b] else 512)
    texts = [made.locate(row) for row in range(200)]
    starts = collections.Counter((row.objective, row.start) for row in texts)
    assert max(starts.values()) > 1
    assert equal(batch, made.at(0, 60))


def test_one_pass_over_held_out_rows_repeats_nothing():
    for lengths in ([40], [300], [3000], [800] * 50):
        documents = Documents(lengths)
        made = build({"en": documents})
        rows = [made.locate(row) for row in range(made.rows_per_epoch)]
        assert rows and {row.epoch for row in rows} == {0}
        assert sum(row.stop - row.start for row in rows) > 0.6 * sum(lengths)


def test_tiny_streams_fill_rows_over_and_over():
    made = build({"en": Documents([17])}, seq_length=64)
    assert made.rows_per_epoch == 1
    for row in range(10):
        assert made.locate(row).stop - made.locate(row).start == 17


@given(st.integers(1, 3000), st.integers(0, 2**64 - 1))
@settings(max_examples=40)
def test_shuffled_is_a_permutation(size, key):
    assert sorted(shuffled(i, size, key) for i in range(size)) == list(range(size))


def test_shuffled_is_even():
    """Every element gets every place equally often: chi-square, 36 degrees of freedom, 99.9% point."""
    counts = np.zeros((7, 7))
    for key in range(4900):
        for index in range(7):
            counts[index, shuffled(index, 7, key * 0x9E3779B97F4A7C15 % 2**64)] += 1
    assert ((counts - 700) ** 2 / 700).sum() < 68


def test_huge_sources_are_planned_without_work():
    """A trillion tokens: only lengths are read until a row is requested."""
    documents = Documents([1])
    documents.lengths = np.full(1000, 10**9, np.int64)
    made = build({"en": documents}, seq_length=2048)
    assert made.rows_per_epoch > 4 * 10**8
    assert made.locate(10**8).epoch == 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weights": {"fr": 1.0}}, "source fr has a weight but does not exist; known: en, zh"),
        ({"objectives": {"gmsk": 1.0}}, "gmsk has a weight but does not exist; known: mask, gmask, smask"),
        ({"sources": {"en": Documents([5, 6])}}, "source en holds 11 tokens"),
        ({"seq_length": 4}, "do not fit 4 tokens"),
        ({"seed": -1}, "seed is -1"),
    ],
)
def test_mistakes_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        build(**change)


def test_rows_before_the_first_and_beyond_the_last_are_refused():
    for row in (-1, batches.LAST_ROW):
        with pytest.raises(ValueError, match="is not in"):
            build().at(row, 1)
