"""The rule of divergence, checked by hand."""

import math

import numpy as np
import pytest

from glm_jax.sweeps.verdict import Verdict, breaks, judge, smooth

UNIFORM, UNIGRAM, WARMUP = 7.6, 6.0, 10
NAN, INF = float("nan"), float("inf")


def falling(steps: int = 100, last: float = 4.0) -> list[float]:
    return np.linspace(7.6, last, steps).tolist()


def verdict(losses: list[float]) -> Verdict:
    return judge(losses, WARMUP, UNIFORM, UNIGRAM)


def test_the_moving_average_is_corrected_for_its_start_and_leaves_out_what_is_not_finite() -> None:
    assert smooth([3.0, 3.0, 3.0]) == pytest.approx([3.0, 3.0, 3.0])
    # weights 0.05 * 0.95 and 0.05, divided by their sum
    assert smooth([2.0, 4.0])[1] == pytest.approx((0.95 * 2 + 4) / 1.95)
    averages = smooth([NAN, 2.0, INF, 2.0])
    assert math.isnan(averages[0]) and averages[1:] == pytest.approx([2.0, 2.0, 2.0])


def test_a_falling_curve_finishes() -> None:
    assert verdict(falling()) == Verdict() and Verdict().status == "finished"


def test_a_run_of_losses_that_are_not_finite() -> None:
    losses = falling()
    losses[40:44] = [NAN, INF, NAN, NAN]  # steps 41 to 44: four are allowed
    assert verdict(losses) == Verdict()
    losses[44] = NAN
    assert verdict(losses) == Verdict(41, "not finite") and verdict(losses).status == "diverged"
    assert verdict([NAN] * 100) == Verdict(1, "not finite")


def test_above_a_uniform_guess_counts_only_after_the_warm_up() -> None:
    early = [9.0] * 3 + falling()
    assert smooth(early)[2] > UNIFORM + 0.5 > smooth(early)[WARMUP] and verdict(early) == Verdict()
    constant = [UNIFORM + 0.6] * 100
    assert verdict(constant) == Verdict(WARMUP + 1, "above a uniform guess")
    assert verdict([UNIFORM + 0.4] * 100).reason == "learnt nothing"


def test_risen_at_the_end_counts_and_risen_between_does_not() -> None:
    fall, high = falling(200, 3.0), [5.0] * 100
    # After the fall m is a little above 3: it exceeds its lowest by 0.5 once 2 * (1 - 0.95 ** n) exceeds about 0.5.
    averages = smooth(fall + high)
    lowest = averages.min()
    last = int(np.flatnonzero(averages <= lowest + 0.5)[-1]) + 1
    assert 200 < last < 210
    assert verdict(fall + high) == Verdict(last, "risen")
    assert verdict(fall + high + [3.0] * 100) == Verdict()


def test_no_better_than_the_frequencies() -> None:
    losses = falling(100, 6.3) + [6.2] * 100
    lowest = int(smooth(losses).argmin()) + 1
    assert verdict(losses) == Verdict(lowest, "learnt nothing")
    assert verdict(falling(100, 6.3) + [5.95] * 100).reason == "learnt nothing"
    assert verdict(falling(100, 6.3) + [5.85] * 100) == Verdict()


def test_a_trained_member_breaks_where_its_average_has_risen() -> None:
    """m after k losses of 2 beyond a long run of 1 is 2 - 0.95**k: above 1.5 first at k = 14, as 0.95**14 = 0.488."""
    losses = [1.0] * 200 + [2.0] * 30
    assert breaks(losses, 150) == 214
    assert breaks(losses, 214) == 215  # it had risen before
    assert breaks([1.0] * 230, 150) is None
    assert breaks([1.0] * 200 + [1.4] * 100, 150) is None
    assert breaks([1.0] * 200 + [math.nan] * 5 + [1.0] * 20, 150) == 201
    assert breaks([1.0] * 200 + [math.inf] * 4 + [1.0] * 20, 150) is None


def test_a_fall_during_the_stairs_counts() -> None:
    """The lowest average so far counts: what falls from 3 to 1 and rises to 2 has risen."""
    assert breaks([3.0] * 100 + [1.0] * 200 + [2.0] * 30, 100) == pytest.approx(314, abs=1)
