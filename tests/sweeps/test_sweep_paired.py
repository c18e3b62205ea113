"""Paired comparisons, against numbers by hand and the published table of Student's sleep data."""

import pytest

from glm_jax.sweeps.paired import compare, comparisons, difference

# hours of sleep gained by ten patients under two drugs (Student 1908, table 1)
DEXTRO = (0.7, -1.6, -0.2, -1.2, -0.1, 3.4, 3.7, 0.8, 0.0, 2.0)
LAEVO = (1.9, 0.8, 1.1, 0.1, -0.1, 4.4, 5.5, 1.6, 4.6, 3.4)


def test_students_own_data() -> None:
    """Mean 1.58, standard deviation 1.23, t = 4.06 with 9 degrees of freedom, whose 97.5% quantile is 2.262."""
    found = difference(DEXTRO, LAEVO)
    assert found.mean == pytest.approx(1.58) and found.pairs == 10
    half = 2.262157 * 1.229995 / 10**0.5
    assert (found.low, found.high) == pytest.approx((1.58 - half, 1.58 + half), abs=1e-5)
    assert found.p == pytest.approx(0.002833, abs=1e-6) and found.shown
    assert str(found) == "+1.580 [+0.700, +2.460] (n = 10, p = 0.0028)"


def test_three_pairs_of_like_size_are_not_enough() -> None:
    """Twice the spread at n = 3: t = 2 * sqrt(3) with 2 degrees of freedom gives p = 0.074."""
    found = difference((0, 0, 0), (1, 2, 3))
    assert found.p == pytest.approx(0.0742, abs=1e-4) and not found.shown


def test_pairs_without_spread_and_without_pairs() -> None:
    """Rates of a grid, such as 0.1 and 0.3, have logarithms that differ by the same but for their last digit."""
    for first, second, mean in (((1, 2), (1, 2), 0), ((1, 2), (2, 3), 1), ((-1, -2.1), (-0.7, -1.8), 0.3)):
        found = difference(first, second)
        assert found.mean == pytest.approx(mean) and not found.shown
        assert str(found) == f"{mean:+.3f} (n = 2, the same in all: no interval)"
    for wrong in (((), ()), ((1,), (2,)), ((1, 2), (1,)), ((1, float("nan")), (1, 2))):
        with pytest.raises(ValueError, match="two or more pairs"):
            difference(*wrong)


def test_members_are_paired_by_all_other_labels() -> None:
    losses = {("pre", "1"): 3.0, ("pre", "2"): 5.0, ("pre", "3"): None, ("post", "2"): 7.0, ("post", "1"): 4.0,
              ("post", "3"): 1.0, ("deepnorm", "1"): 0.0}  # fmt: skip
    rows = [{"labels": {"norm": norm, "seed": seed}, "loss": loss} for (norm, seed), loss in losses.items()]
    found = compare(rows, "norm", "pre", "post", lambda row: row["loss"])
    assert found.mean == 1.5 and found.pairs == 2
    with pytest.raises(ValueError, match="two or more pairs"):
        compare(rows, "norm", "pre", "deepnorm", lambda row: row["loss"])


def test_a_table_of_comparisons() -> None:
    """By depth: differences 1 and 3 have the mean 2, and their interval is 12.706 * sqrt(2) / sqrt(2) to each side."""
    losses = {
        ("8", "pre"): (3.0, 5.0),
        ("8", "post"): (4.0, 8.0),
        ("48", "pre"): (1.0, 1.0),
        ("48", "post"): (None, 2.0),
    }
    rows = [
        {"labels": {"depth": depth, "norm": norm, "seed": str(seed)}, "loss": loss}
        for (depth, norm), pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    expected = ["| 8 | post - pre | +2.000 [-10.706, +14.706] (n = 2, p = 0.3) |"]
    assert comparisons(rows, lambda row: row["loss"]).splitlines()[2:] == expected
    others = [{"labels": {"depth": "16", "norm": norm, "seed": seed}, "loss": 1.0 + (norm == "post") * float(seed)}
              for norm in ("post", "sandwich") for seed in "01"]  # fmt: skip
    found = comparisons([*rows, *others], lambda row: row["loss"])
    assert found.splitlines()[2:] == expected, "16 layers lack pre, with which all are compared"
    assert comparisons(others[:1], lambda row: row["loss"]) == "No comparison has two pairs of members."


def test_arms_are_compared_at_each_learning_rate() -> None:
    losses = {("a", "0.1"): (1.0, 2.0), ("b", "0.1"): (2.0, 4.0), ("a", "0.2"): (1.0, 2.0), ("b", "0.2"): (0.0, 1.5)}
    rows = [
        {"labels": {"arm": arm, "lr": rate, "seed": str(seed)}, "loss": loss}
        for (arm, rate), pair in losses.items()
        for seed, loss in enumerate(pair)
    ]
    lines = comparisons(rows, lambda row: row["loss"]).splitlines()[2:]
    assert [line.split(" [")[0] for line in lines] == ["| 0.1 | b - a | +1.500", "| 0.2 | b - a | -0.750"]
