"""Pipeline schedules as plain data: which stage runs which slot at which tick. Pure Python.

All stages move in lockstep. In a tick each stage has one forward slot, then one backward slot; either may be idle.
Results travel to the neighbouring stage between ticks, so a microbatch enters the next stage exactly one tick later.
`check` proves that a table follows these rules; run.py runs any table that does.

| schedule | forward of microbatch m on stage s | backward of m on s     | stash slots of stage s  |
|----------|------------------------------------|------------------------|-------------------------|
| 1f1b     | tick s + m                         | tick 2(P - 1) - s + m  | min(M, 2(P - 1 - s) + 1) |
| gpipe    | tick s + m                         | M + 2(P - 1) - s + m   | M                       |

Both are idle for (P - 1) / (M + P - 1) of the time. With 1f1b (PipeDream-Flush, arXiv 2006.09503), which GLM-130B used,
the number of stashed inputs does not grow with M: 2(P - 1 - s) + 1 in lockstep, where free-running stages need P - s.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterable
from fractions import Fraction

from glm_jax.errors import UserError

IDLE = -1
Rows = tuple[tuple[int, ...], ...]


@dataclasses.dataclass(frozen=True)
class Schedule:
    """A table: `forward[t][s]` is the microbatch that stage s runs forward at tick t, or IDLE; `backward` likewise.

    Every stage has `ring` stash slots; microbatch m uses slot m % ring. The ring of 1f1b follows from the stages alone,
    so that its memory does not depend on M.
    """

    name: str
    stages: int
    microbatches: int
    forward: Rows
    backward: Rows
    ring: int

    @property
    def ticks(self) -> int:
        """The number of rows of the table."""
        return len(self.forward)

    def makespan(self, forward: int, backward: int) -> int:
        """Return how long all ticks take, each as long as its busiest stage, for slots of these lengths."""
        return sum(
            max(forward * (f != IDLE) + backward * (b != IDLE) for f, b in zip(*rows, strict=True))
            for rows in zip(self.forward, self.backward, strict=True)
        )

    def bubble_of(self, forward: int, backward: int) -> Fraction:
        """Return the share of a stage's time that is idle, for slots of these lengths."""
        return 1 - Fraction(self.microbatches * (forward + backward), self.makespan(forward, backward))

    @property
    def bubble(self) -> Fraction:
        """The share of a stage's time that is idle, if a backward slot takes twice as long as a forward one."""
        return self.bubble_of(1, 2)

    @property
    def in_flight(self) -> tuple[int, ...]:
        """The stash slots of each stage: the most microbatches whose input it must keep at once."""
        return tuple(self._most_kept(stage) for stage in range(self.stages))

    @property
    def output_ring(self) -> int:
        """The most outputs of the last stage that await their backward at once."""
        return self.in_flight[-1]

    def _most_kept(self, stage: int) -> int:
        kept = most = 0
        for forward, backward in zip(self.forward, self.backward, strict=True):
            kept += forward[stage] != IDLE
            most = max(most, kept)
            kept -= backward[stage] != IDLE
        return most


def _rows(ticks: int, stages: int, microbatches: int, first: Callable[[int], int]) -> Rows:
    """Return the table in which stage s runs microbatch m at tick `first(s)` + m."""

    def job(tick: int, stage: int) -> int:
        microbatch = tick - first(stage)
        return microbatch if 0 <= microbatch < microbatches else IDLE

    return tuple(tuple(job(tick, stage) for stage in range(stages)) for tick in range(ticks))


def _one_forward_one_backward(stages: int, microbatches: int) -> tuple[Rows, Rows, int]:
    ticks, last = microbatches + 2 * (stages - 1), stages - 1
    return (
        _rows(ticks, stages, microbatches, lambda stage: stage),
        _rows(ticks, stages, microbatches, lambda stage: 2 * last - stage),
        2 * last + 1,
    )


def _gpipe(stages: int, microbatches: int) -> tuple[Rows, Rows, int]:
    ticks, last = 2 * (microbatches + stages - 1), stages - 1
    return (
        _rows(ticks, stages, microbatches, lambda stage: stage),
        _rows(ticks, stages, microbatches, lambda stage: microbatches + 2 * last - stage),
        microbatches,
    )


SCHEDULES: dict[str, Callable[[int, int], tuple[Rows, Rows, int]]] = {
    "1f1b": _one_forward_one_backward,
    "gpipe": _gpipe,
}


@functools.lru_cache(maxsize=16)  # a trace builds its schedule several times, and checks it for seconds if it is long
def build(name: str, stages: int, microbatches: int) -> Schedule:
    """Build a schedule and check it.

    >>> schedule = build("1f1b", stages=4, microbatches=8)
    >>> schedule.ticks, schedule.bubble, schedule.in_flight
    (14, Fraction(3, 11), (7, 5, 3, 1))

    Args:
        name: one of `SCHEDULES`.
        stages: P.
        microbatches: M.

    Raises:
        UserError: the name is unknown, or a count is below 1.
    """
    if name not in SCHEDULES:
        raise UserError(f"pipeline.schedule is {name!r}, it must be one of {', '.join(SCHEDULES)}")
    for what, count in (("stages", stages), ("microbatches", microbatches)):
        if count < 1:
            raise UserError(f"a schedule of {count} {what} is empty: {what} must be at least 1")
    schedule = Schedule(name, stages, microbatches, *SCHEDULES[name](stages, microbatches))
    check(schedule)
    return schedule


def check(schedule: Schedule) -> None:
    """Prove that a table can run.

    Every stage runs every microbatch forward once and backward once, one job a slot. Each input is made exactly one
    tick before it is needed. No stashed input is overwritten before its backward has read it.

    Raises:
        ValueError: names the first broken rule, the stage and the microbatch.
    """
    stages, microbatches, ring = schedule.stages, schedule.microbatches, schedule.ring
    forward = [_ticks_of(schedule.forward, stage, microbatches, "forward") for stage in range(stages)]
    backward = [_ticks_of(schedule.backward, stage, microbatches, "backward") for stage in range(stages)]
    for stage in range(stages):
        for microbatch in range(microbatches):
            place = f"microbatch {microbatch} on stage {stage}"
            if stage > 0 and forward[stage][microbatch] != forward[stage - 1][microbatch] + 1:
                raise ValueError(f"forward of {place} is not one tick after that of stage {stage - 1}")
            if stage < stages - 1 and backward[stage][microbatch] != backward[stage + 1][microbatch] + 1:
                raise ValueError(f"backward of {place} is not one tick after that of stage {stage + 1}")
            if backward[stage][microbatch] < forward[stage][microbatch]:
                raise ValueError(f"backward of {place} comes before its forward")
            after = microbatch + ring
            if after < microbatches and forward[stage][after] <= backward[stage][microbatch]:
                raise ValueError(f"the stashed input of {place} is written over by microbatch {after}")


def _ticks_of(rows: Iterable[tuple[int, ...]], stage: int, microbatches: int, slot: str) -> list[int]:
    """Return the tick of each microbatch on one stage; each must have exactly one."""
    ticks: dict[int, int] = {}
    for tick, row in enumerate(rows):
        microbatch = row[stage]
        if microbatch == IDLE:
            continue
        if microbatch in ticks:
            raise ValueError(f"{slot} of microbatch {microbatch} on stage {stage} comes twice")
        ticks[microbatch] = tick
    if sorted(ticks) != list(range(microbatches)):
        raise ValueError(f"{slot} slots of stage {stage} do not hold each of {microbatches} microbatches")
    return [ticks[microbatch] for microbatch in range(microbatches)]
