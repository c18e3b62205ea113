"""Whether one treatment differs from another: the differences of members that share all else, with their interval."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from scipy import stats

from glm_jax.sweeps.results import Row, table

CONFIDENCE = 0.95
RESOLUTION = 1e-8  # of saved numbers, which have nine digits: less is no spread


class Difference(NamedTuple):
    """The mean difference of pairs, its interval by Student's t, and the p-value of no difference (two-sided).

    Interval and p are NaN if all pairs differ by the same: without spread, Student's t has no value. Rates on a grid do
    this often, and it says no more than that the pairs agree.
    """

    mean: float
    low: float
    high: float
    p: float
    pairs: int

    def __str__(self) -> str:
        if math.isnan(self.p):
            return f"{self.mean:+.3f} (n = {self.pairs}, the same in all: no interval)"
        return f"{self.mean:+.3f} [{self.low:+.3f}, {self.high:+.3f}] (n = {self.pairs}, p = {self.p:.2g})"

    @property
    def shown(self) -> bool:
        """Whether the interval excludes no difference."""
        return self.low > 0 or self.high < 0


def difference(first: Sequence[float], second: Sequence[float]) -> Difference:
    """Compare paired values [n] by the t-test for pairs: of second - first.

    Raises:
        ValueError: there are fewer than two pairs, or values that are not finite.
    """
    before, after = np.asarray(first, np.float64), np.asarray(second, np.float64)
    if before.shape != after.shape or before.size < 2 or not (np.isfinite(before).all() and np.isfinite(after).all()):
        raise ValueError("a paired comparison takes two or more pairs of finite values")
    change = after - before
    if np.ptp(change) <= RESOLUTION * np.abs([before, after]).max():
        return Difference(float(change.mean()), math.nan, math.nan, math.nan, change.size)
    tested = stats.ttest_rel(after, before)
    interval = tested.confidence_interval(CONFIDENCE)
    return Difference(
        float(change.mean()), float(interval.low), float(interval.high), float(tested.pvalue), change.size
    )


def compare(
    rows: Sequence[Row], axis: str, first: str, second: str, value: Callable[[Row], float | None]
) -> Difference:
    """Compare two labels of an axis over the members that are alike in all other labels.

    Args:
        rows: of results.json.
        value: what to compare; a pair of which one has None is left out.

    Raises:
        ValueError: fewer than two pairs have both values.
    """
    found: dict[tuple[str, ...], dict[str, float | None]] = {}
    for row in rows:
        rest = tuple(label for name, label in row["labels"].items() if name != axis)
        found.setdefault(rest, {})[row["labels"][axis]] = value(row)
    pairs = [(pair.get(first), pair.get(second)) for pair in found.values()]
    both = [(before, after) for before, after in pairs if before is not None and after is not None]
    return difference(*zip(*both, strict=True)) if len(both) > 1 else difference((), ())


def comparisons(rows: Sequence[Row], value: Callable[[Row], float | None]) -> str:
    """Return a Markdown table of the last axis before rate and seed: each label less the first, by all other labels.

    Members are paired by their seeds. Comparisons with fewer than two pairs are left out; if all are, it says so.
    """
    axes = [name for name in rows[0]["labels"] if name != "seed"]
    axis = [name for name in axes if name != "lr"][-1]
    first, *rest = dict.fromkeys(row["labels"][axis] for row in rows)  # the same first for all, whatever is missing
    others = [name for name in axes if name != axis]
    settings: dict[tuple[str, ...], list[Row]] = {}
    for row in rows:
        settings.setdefault(tuple(row["labels"][name] for name in others), []).append(row)
    lines = []
    for setting, alike in settings.items():
        for label in rest:
            with contextlib.suppress(ValueError):
                lines.append([*setting, f"{label} - {first}", str(compare(alike, axis, first, label, value))])
    if not lines:
        return "No comparison has two pairs of members."
    return table([*others, axis, "difference at equal seeds [95% interval]"], lines)
