"""Which source and objective the k-th row has, in closed form: no state and no random numbers.

Labels (pairs of a source and an objective) have weights that may change during training. Rows are assigned so that
the number of a label's rows up to any row stays close to its integrated weight. That number, its inverse and the label
of any row take a few integer operations, so a run can start at any row or jump.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glm_jax.errors import UserError

# Knots of a piecewise-linear history: (row, weights from there on). A plain mapping is a history of one knot.
History = Mapping[str, float] | Sequence[tuple[int, Mapping[str, float]]]

QUOTA = 1 << 40  # shares are rounded to multiples of one row in this many, about 10^12
STAIR = 1024  # a ramp is made of stairs this many rows long, on a fixed grid: later knots do not move them


def temperature_weights(sizes: Mapping[str, float], temperature: float) -> dict[str, float]:
    """Return weights proportional to size ** (1 / temperature), summing to 1.

    At 1, sources are drawn by size; towards infinity, all equally (multilingual BERT, XLM: 1.4 to 3.3).

    >>> temperature_weights({"en": 9.0, "zh": 1.0}, temperature=2.0)
    {'en': 0.75, 'zh': 0.25}

    Raises:
        UserError: the temperature or a size is not positive.
    """
    if temperature <= 0:
        raise UserError(f"the sampling temperature is {temperature}, it must be above 0")
    for name, size in sizes.items():
        if size <= 0:
            raise UserError(f"source {name} has size {size}, it must be above 0")
    largest = max(sizes.values())
    weights = {name: (size / largest) ** (1 / temperature) for name, size in sizes.items()}
    total = sum(weights.values())
    return {name: weight / total for name, weight in weights.items()}


def with_weights(history: History, constant: Mapping[str, float]) -> History:
    """Return the history in which each knot gives the names that it leaves out their weights of `constant`."""
    if isinstance(history, Mapping):
        return {**constant, **history}
    return [(row, {**constant, **weights}) for row, weights in history]


def _knots(history: History, where: str) -> list[tuple[int, Mapping[str, float]]]:
    """Check a history and return its knots."""
    knots = [(0, history)] if isinstance(history, Mapping) else list(history)
    if not knots or knots[0][0] != 0:
        raise UserError(f"{where} must begin at row 0")
    for (before, _), (after, _) in zip(knots, knots[1:], strict=False):
        if after < before:
            raise UserError(f"{where} name row {after} after row {before}: put them in order")
    for row, weights in knots:
        for name, weight in weights.items():
            if not (weight >= 0 and math.isfinite(weight)):
                raise UserError(f"{where} give {name} {weight} at row {row}, it must be a finite number of at least 0")
        if sum(weights.values()) <= 0:
            raise UserError(f"{where} are all 0 at row {row}: give at least one a share")
    return knots


def _stairs(history: History, where: str) -> list[tuple[int, Mapping[str, float]]]:
    """Turn a piecewise-linear history into a piecewise-constant one: (first row, weights), rows strictly increasing.

    A stair has the ramp's value at its middle, so that both have the same integral.
    """
    knots = _knots(history, where)
    stairs: dict[int, Mapping[str, float]] = {}
    for (start, before), (stop, after) in zip(knots, knots[1:], strict=False):
        if before == after:
            stairs[start] = before
            continue
        edges = [start, *range((start // STAIR + 1) * STAIR, stop, STAIR), stop]
        for left, right in zip(edges, edges[1:], strict=False):
            if left < right:
                part = ((left + right) / 2 - start) / (stop - start)
                names = [*before, *(name for name in after if name not in before)]
                stairs[left] = {
                    name: (1 - part) * before.get(name, 0.0) + part * after.get(name, 0.0) for name in names
                }
    stairs[knots[-1][0]] = knots[-1][1]
    return sorted(stairs.items(), key=lambda stair: stair[0])


@dataclass(frozen=True)
class _Stretch:
    """Rows with constant quotas.

    Attributes:
        start: the first row.
        counts: [labels], rows of each label before `start`.
        quotas: [labels + 1], quotas[i] is the sum of the first i labels' shares of QUOTA.
        carried: [labels + 1], fractions (times the quota) left over by earlier stretches.
    """

    start: int
    counts: tuple[int, ...]
    quotas: tuple[int, ...]
    carried: tuple[int, ...]

    def prefixes(self, offset: int) -> list[int]:
        """Return how many of the first `offset` rows of the stretch belong to the first i labels, for i = 0..labels.

        Nested floors: of the rows of the first i + 1 labels, the first i get quotas[i] out of every quotas[i + 1],
        evenly spread. Each count grows by 0 or 1 per row, and only where the next count grows, so every row belongs to
        exactly one label.
        """
        counts = [0] * len(self.quotas)
        counts[-1] = offset
        for i in range(len(counts) - 2, 0, -1):
            if self.quotas[i + 1]:
                counts[i] = (counts[i + 1] * self.quotas[i] + self.carried[i]) // self.quotas[i + 1]
        return counts


class Mixture:
    """The label of every row.

    Rows count from 0 and stand for samples seen, so the batch size changes nothing here. A label's count up to a row
    differs from its integrated weight by less than the number of labels.

    >>> labels = [("en", "mask"), ("en", "gmask"), ("zh", "mask"), ("zh", "gmask")]
    >>> mixture = Mixture(labels, {"en": 3.0, "zh": 1.0}, {"mask": 0.5, "gmask": 0.5})
    >>> mixture.counts(800)
    [300, 300, 100, 100]
    >>> label, ordinal = mixture.draw(5)  # row 5 is the second English [MASK] row
    >>> labels[label], ordinal, mixture.row_of(label, ordinal)
    (('en', 'mask'), 1, 5)
    """

    def __init__(self, labels: Sequence[tuple[str, str]], sources: History, objectives: History) -> None:
        """Assign rows: to objectives by their shares, and an objective's rows to its sources by theirs.

        Args:
            labels: (source, objective) pairs; others have no rows.
            sources, objectives: weights by name. A name missing from a knot has weight 0 there. If no source of an
                objective has a weight, the other objectives share its rows.

        Raises:
            UserError: a weight is negative, there is no weight at all, or knots are out of order.
        """
        self.labels = tuple(labels)
        source_stairs = _stairs(sources, "source weights")
        objective_stairs = _stairs(objectives, "objective weights")
        stretches: list[_Stretch] = []
        for start in sorted({row for row, _ in source_stairs} | {row for row, _ in objective_stairs}):
            source = _at(source_stairs, start)
            objective = _at(objective_stairs, start)
            quotas = self._quotas(start, source, objective)
            if not stretches or stretches[-1].quotas != quotas:
                stretches.append(_next_stretch(stretches, start, quotas))
        self._stretches = stretches
        self._starts = [stretch.start for stretch in stretches]

    def _quotas(self, row: int, source: Mapping[str, float], objective: Mapping[str, float]) -> tuple[int, ...]:
        totals = dict.fromkeys((kind for _, kind in self.labels), 0.0)
        for name, kind in self.labels:
            totals[kind] += source.get(name, 0.0)
        weights = [
            objective.get(kind, 0.0) * source.get(name, 0.0) / totals[kind] if totals[kind] else 0.0
            for name, kind in self.labels
        ]
        sums = [0.0, *itertools.accumulate(weights)]
        if sums[-1] <= 0:
            raise UserError(f"no source and objective have a weight above 0 together at row {row}")
        return tuple(round(part / sums[-1] * QUOTA) for part in sums)

    def _stretch(self, row: int) -> _Stretch:
        return self._stretches[bisect.bisect_right(self._starts, row) - 1]

    def counts(self, row: int) -> list[int]:
        """Return how many of the rows before `row` each label has; they sum to `row`."""
        stretch = self._stretch(row)
        prefixes = stretch.prefixes(row - stretch.start)
        return [
            before + right - left for before, left, right in zip(stretch.counts, prefixes, prefixes[1:], strict=False)
        ]

    def draw(self, row: int) -> tuple[int, int]:
        """Return (label, ordinal) of `row`, which is the label's ordinal-th row, from 0."""
        stretch = self._stretch(row)
        before, after = stretch.prefixes(row - stretch.start), stretch.prefixes(row - stretch.start + 1)
        label = next(i for i in range(len(self.labels)) if after[i + 1] > before[i + 1])
        return label, stretch.counts[label] + before[label + 1] - before[label]

    def row_of(self, label: int, ordinal: int) -> int:
        """Return the row for which `draw` returns (label, ordinal).

        Raises:
            ValueError: the label has no such row.
        """
        index = bisect.bisect_right(self._stretches, ordinal, key=lambda stretch: stretch.counts[label]) - 1
        stretch = self._stretches[index]
        quotas, carried = stretch.quotas, stretch.carried
        width = quotas[label + 1] - quotas[label]
        if width == 0:
            raise ValueError(f"label {self.labels[label]} has no row {ordinal}")
        # The place among the rows of the first label + 1 labels: a row there that is not one of the first labels'.
        place = ((ordinal - stretch.counts[label]) * quotas[label + 1] + carried[label]) // width
        for i in range(label + 1, len(self.labels)):  # then among those of the first i + 1 labels
            place = -((carried[i] - (place + 1) * quotas[i + 1]) // quotas[i]) - 1
        return stretch.start + place


def _at(stairs: list[tuple[int, Mapping[str, float]]], row: int) -> Mapping[str, float]:
    return stairs[bisect.bisect_right(stairs, row, key=lambda stair: stair[0]) - 1][1]


def _next_stretch(stretches: list[_Stretch], start: int, quotas: tuple[int, ...]) -> _Stretch:
    """Return the stretch that follows the last one at row `start`, carrying over what its floors left."""
    labels = len(quotas) - 1
    if not stretches:
        return _Stretch(start, (0,) * labels, quotas, (0,) * (labels + 1))
    last = stretches[-1]
    prefixes = last.prefixes(start - last.start)
    counts = tuple(last.counts[i] + prefixes[i + 1] - prefixes[i] for i in range(labels))
    carried = [0] * (labels + 1)
    for i in range(1, labels):
        if last.quotas[i + 1]:
            left = (prefixes[i + 1] * last.quotas[i] + last.carried[i]) % last.quotas[i + 1]
            carried[i] = left * quotas[i + 1] // last.quotas[i + 1]
    return _Stretch(start, counts, quotas, tuple(carried))
