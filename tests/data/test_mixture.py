"""The assignment of rows to sources and objectives: exact, invertible, and stable under later changes."""

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.data.rows.mixture import STAIR, Mixture, temperature_weights
from glm_jax.errors import UserError

KINDS = ("mask", "gmask")
weight = st.one_of(st.just(0.0), st.floats(1e-3, 10.0))


@st.composite
def histories(draw, names):
    """Draw one to four knots within a few thousand rows, some at the same row."""
    rows = [0, *sorted(draw(st.lists(st.integers(0, 4000), max_size=3)))]
    history = []
    for row in rows:
        weights = {name: draw(weight) for name in names}
        if not any(weights.values()):
            weights[draw(st.sampled_from(names))] = 1.0
        history.append((row, weights))
    return history


def build(sources, objectives, names=("a", "b", "c")):
    """Return a mixture of all pairs."""
    return Mixture(list(itertools.product(names, KINDS)), sources, objectives)


@given(histories(("a", "b", "c")), histories(KINDS), st.integers(0, 10_000))
def test_every_row_belongs_to_exactly_one_label(sources, objectives, row):
    mixture = build(sources, objectives)
    for k in range(row, row + 30):
        before, after = mixture.counts(k), mixture.counts(k + 1)
        assert sum(before) == k
        label, ordinal = mixture.draw(k)
        assert ordinal == before[label]
        assert [right - left for left, right in zip(before, after, strict=True)] == [
            int(i == label) for i in range(len(before))
        ]


@given(histories(("a", "b", "c")), histories(KINDS), st.integers(0, 2**45))
def test_row_of_inverts_draw(sources, objectives, row):
    mixture = build(sources, objectives)
    for k in (row, row % 5000):
        assert mixture.row_of(*mixture.draw(k)) == k


@given(histories(("a", "b")), histories(KINDS))
@settings(max_examples=30)
def test_counts_stay_next_to_the_integrated_weight(sources, objectives):
    """Integrate the shares stair by stair, as documented, and compare at every 97th row."""
    names = ("a", "b")
    mixture = build(sources, objectives, names)

    def value(history, name, start, stop):
        """Return a weight in [start, stop): the ramp's value at the middle of the stair there."""
        before = [knot for knot in history if knot[0] <= start][-1]
        later = [knot for knot in history if knot[0] > start]
        if not later:
            return before[1][name]
        left = max(before[0], start // STAIR * STAIR)
        right = min(later[0][0], (start // STAIR + 1) * STAIR)
        part = ((left + right) / 2 - before[0]) / (later[0][0] - before[0])
        return (1 - part) * before[1][name] + part * later[0][1][name]

    edges = {0, 9000, *range(0, 9000, STAIR), *(row for row, _ in sources), *(row for row, _ in objectives)}
    integral = [0.0] * 4
    for start, stop in itertools.pairwise(sorted(edges)):
        weights = [
            value(sources, name, start, stop) * value(objectives, kind, start, stop)
            for name, kind in itertools.product(names, KINDS)
        ]
        shares = [weight / sum(weights) for weight in weights]
        for row in range(start, stop, 97):
            for count, done, share in zip(mixture.counts(row), integral, shares, strict=True):
                assert abs(count - (done + share * (row - start))) < 4
        integral = [done + share * (stop - start) for done, share in zip(integral, shares, strict=True)]


def test_a_count_is_the_floor_of_its_integrated_weight():
    mixture = build({"a": 0.3, "b": 0.7}, {"mask": 1.0}, ("a", "b"))
    for row in range(2000):
        counts = mixture.counts(row)
        assert counts[0] == 3 * row // 10 and counts[2] == row - counts[0]


def test_what_rounding_leaves_over_is_carried_through_every_change():
    """400 changes a few rows apart, many of them to a weight of 0: a fraction lost at each would add up."""
    generator, names = np.random.default_rng(0), ("a", "b", "c", "d")
    weights = generator.integers(0, 4, (400, 4))
    weights[:, 1] += 1  # so that some label has rows
    weights[::2, 0] = 0
    starts = np.cumsum(generator.integers(1, 6, 400)) - 1
    starts -= starts[0]
    history = [(int(row), dict(zip(names, map(float, those), strict=True)))
               for row, those in zip(starts, weights, strict=True)]  # fmt: skip
    jumps = [knot for (row, _), (_, before) in zip(history[1:], history[:-1], strict=True) for knot in [(row, before)]]
    knots = [history[0], *itertools.chain(*zip(jumps, history[1:], strict=True))]
    mixture = Mixture([(name, "mask") for name in names], knots, {"mask": 1.0})
    integral = np.cumsum(weights[:-1] / weights[:-1].sum(1, keepdims=True) * np.diff(starts)[:, None], 0)
    for row, expected in zip(starts[1:], integral, strict=True):
        assert np.abs(mixture.counts(int(row)) - expected).max() < len(names)


def test_a_ramp_gives_its_area():
    """From all a to all b over 20 stairs: half of the rows each, and a quarter of b's in the first half."""
    end = 20 * STAIR
    mixture = build([(0, {"a": 1.0, "b": 0.0}), (end, {"a": 0.0, "b": 1.0})], {"mask": 1.0}, ("a", "b"))
    assert abs(mixture.counts(end)[2] - end / 2) <= 1
    assert abs(mixture.counts(end // 2)[2] - end / 8) <= 1
    assert mixture.draw(end + 10**9)[0] == 2


def test_two_knots_at_one_row_make_a_jump():
    mixture = build([(0, {"a": 1.0}), (100, {"a": 1.0}), (100, {"b": 1.0})], {"mask": 1.0}, ("a", "b"))
    assert [mixture.draw(row)[0] for row in (0, 99, 100, 5000)] == [0, 0, 2, 2]
    with pytest.raises(ValueError, match="no row 100"):
        mixture.row_of(0, 100)
    with pytest.raises(ValueError, match="no row 0"):
        mixture.row_of(1, 0)


@given(histories(("a", "b", "c")), histories(KINDS), st.integers(4000, 6000), histories(("a", "b", "c")))
@settings(max_examples=30)
def test_a_later_change_leaves_earlier_rows_alone(sources, objectives, row, later):
    """What an operator does to a running mixture: keep the old weights up to a row, then use others."""
    old = build(sources, objectives)
    changed = build([*sources, (row, sources[-1][1]), (row, later[0][1])], objectives)
    assert [old.draw(k) for k in range(0, row, 61)] == [changed.draw(k) for k in range(0, row, 61)]


def test_cutting_a_ramp_short_leaves_earlier_rows_alone():
    ramp = [(0, {"a": 1.0, "b": 0.0}), (8 * STAIR, {"a": 0.0, "b": 1.0})]
    cut = [ramp[0], (4 * STAIR, {"a": 0.5, "b": 0.5})]
    old, new = (build(history, {"mask": 1.0}, ("a", "b")) for history in (ramp, cut))
    assert [old.draw(k) for k in range(4 * STAIR)] == [new.draw(k) for k in range(4 * STAIR)]


def test_any_window_of_rows_is_mixed():
    """Every window of 20 rows is within a few rows of the shares, however late it is."""
    mixture = build({"a": 0.5, "b": 0.5}, {"mask": 0.3, "gmask": 0.7}, ("a", "b"))
    for start in (0, 12_345, 10**9):
        drawn = [mixture.draw(row)[0] for row in range(start, start + 20)]
        assert all(abs(drawn.count(i) - share) <= 2 for i, share in enumerate((3, 7, 3, 7)))


def test_temperature():
    sizes = {"en": 900.0, "zh": 100.0}
    assert temperature_weights(sizes, 1.0) == pytest.approx({"en": 0.9, "zh": 0.1})
    assert temperature_weights(sizes, 2.0) == pytest.approx({"en": 0.75, "zh": 0.25})
    assert temperature_weights(sizes, 1e9) == pytest.approx({"en": 0.5, "zh": 0.5})
    for wrong in (0.0, -1.0):
        with pytest.raises(UserError, match="temperature"):
            temperature_weights(sizes, wrong)
    with pytest.raises(UserError, match="source zh has size 0"):
        temperature_weights({"en": 1.0, "zh": 0.0}, 1.0)


@pytest.mark.parametrize(
    ("sources", "message"),
    [
        ({"a": -1.0}, "give a -1.0 at row 0"),
        ({"a": float("nan")}, "give a nan"),
        ({"a": 0.0}, "all 0 at row 0"),
        ([(5, {"a": 1.0})], "begin at row 0"),
        ([], "begin at row 0"),
        ([(0, {"a": 1.0}), (9, {"a": 1.0}), (5, {"a": 1.0})], "row 5 after row 9"),
        ({"elsewhere": 1.0}, "no source and objective"),
    ],
)
def test_bad_histories_are_refused(sources, message):
    with pytest.raises(UserError, match=message):
        build(sources, {"mask": 1.0})
