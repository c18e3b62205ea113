"""When a member of a sweep counts as diverged: one rule, a pure function of its loss curve.

Write m(t) for the exponential moving average of the training loss (factor DECAY, bias-corrected as Adam's moments
are; losses that are not finite are left out). A member has diverged if one of these holds, checked in this order:

1. "not finite": the loss is not finite for NOT_FINITE steps in a row.
2. "above a uniform guess": after the warm-up, m exceeds the cost of guessing uniformly among all pieces by more than
   RISE.
3. "risen": m ends more than RISE above its own lowest value.
4. "learnt nothing": m ends less than LEARNT below the cost of guessing by the frequencies of the targets, which needs
   no context.

Any other member has finished, however badly. The step of a divergence is the first from which its rule
held: the first non-finite loss; the first excess; the last time that m was within RISE of its lowest; the lowest m.

LEARNT was 0 when the norm grid began. Its members of 4 layers showed that those that learn nothing end within 0.03
nats of that cost, on either side by chance, and all others at least 0.2 below it. The margin is between the two, for
all members. Deeper members, trained later, fill that gap: the verdicts of some depend on the margin, and notebook 02
names them.

With `optimizer.stairs` a member is first trained and then given higher and higher rates. It breaks at the first step
after the stairs begin at which m is more than RISE above its own lowest value until then, or at the first of NOT_FINITE
losses in a row that are not finite. The rate of that step is the rate at which the trained model breaks.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence

import numpy as np

DECAY = 0.95  # of the moving average: it remembers about 20 steps
RISE = 0.5  # nats
NOT_FINITE = 5  # steps
LEARNT = 0.1  # nats

RULE = {"decay": DECAY, "rise": RISE, "not_finite": NOT_FINITE, "learnt": LEARNT}


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The end of a member: `step` (from 1) and `reason` of its divergence, None where it finished."""

    step: int | None = None
    reason: str | None = None

    @property
    def status(self) -> str:
        """Return `diverged` or `finished`."""
        return "diverged" if self.reason else "finished"


def smooth(losses: Sequence[float] | np.ndarray) -> np.ndarray:
    """Return the moving average m of losses [T]: float64 [T], NaN before the first finite loss."""
    average, weight = 0.0, 0.0
    averages = np.full(len(losses), np.nan)
    for place, loss in enumerate(losses):
        if math.isfinite(loss):
            average = DECAY * average + (1 - DECAY) * loss
            weight = DECAY * weight + (1 - DECAY)
        if weight:
            averages[place] = average / weight
    return averages


def judge(losses: Sequence[float] | np.ndarray, warmup: int, uniform: float, unigram: float) -> Verdict:
    """Judge a loss curve by the rule.

    Args:
        losses: of the training batches, nats a target token [T], from the first step to the last.
        warmup: steps of the learning rate's warm-up.
        uniform: nats a target token that guessing uniformly among all pieces costs, the log of their number.
        unigram: nats a target token that guessing by the targets' own frequencies costs, their entropy.
    """
    if step := _not_finite(losses):
        return Verdict(step, "not finite")
    averages = smooth(losses)
    above = np.flatnonzero(averages[warmup:] > uniform + RISE)
    if len(above):
        return Verdict(warmup + int(above[0]) + 1, "above a uniform guess")
    lowest = int(np.nanargmin(averages))
    if averages[-1] > averages[lowest] + RISE:
        within = np.flatnonzero(averages <= averages[lowest] + RISE)
        return Verdict(int(within[-1]) + 1, "risen")
    if averages[-1] > unigram - LEARNT:
        return Verdict(lowest + 1, "learnt nothing")
    return Verdict()


def breaks(losses: Sequence[float] | np.ndarray, first: int) -> int | None:
    """Return the step at which a member breaks on stairs that begin after step `first`; None if it does not."""
    averages = smooth(losses)
    lowest = np.fmin.accumulate(averages)
    risen = np.flatnonzero(averages[first:] > lowest[first:] + RISE)
    steps = [first + int(risen[0]) + 1] if len(risen) else []
    if step := _not_finite(losses):
        steps.append(step)
    return min(steps, default=None)


def _not_finite(losses: Sequence[float] | np.ndarray) -> int | None:
    """Return the first step of NOT_FINITE in a row whose loss is not finite."""
    run = 0
    for step, loss in enumerate(losses, 1):
        run = 0 if math.isfinite(loss) else run + 1
        if run == NOT_FINITE:
            return step - run + 1
    return None
