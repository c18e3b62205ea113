"""The loss scale's state machine against a trace worked out by hand."""

import jax.numpy as jnp

from glm_jax.training.precision import LossScale, LossScaleConfig, initial_loss_scale, next_loss_scale


def trace(cfg: LossScaleConfig, outcomes: str) -> list[float]:
    """Return the scale after each step: `.` a finite one, `x` one that overflowed."""
    state, scales = initial_loss_scale(cfg), []
    for outcome in outcomes:
        state = next_loss_scale(cfg, state, jnp.bool_(outcome == "."))
        scales.append(float(state.scale))
    return scales


def test_the_scale_follows_the_hand_computed_trace() -> None:
    cfg = LossScaleConfig(initial=16.0, window=3, hysteresis=2, minimum=4.0)
    # one overflow is forgiven, each further one halves, until three good steps double and restore the hysteresis
    assert trace(cfg, "x" "x" "x" "." "." "." "x" "x") == [16, 8, 4, 4, 4, 8, 8, 4]  # fmt: skip
    assert trace(cfg, "xxxxxx")[-1] == 4  # the minimum holds
    assert trace(cfg, "..x...") == [16, 16, 16, 16, 16, 32]  # an overflow restarts the window


def test_a_minimum_that_is_raised_during_a_run_holds_at_once() -> None:
    low = initial_loss_scale(LossScaleConfig(initial=2.0))
    raised = next_loss_scale(LossScaleConfig(minimum=64.0), low, jnp.bool_(True))
    assert float(raised.scale) == 64 and int(raised.good_steps) == 1


def test_other_precisions_keep_scale_one_and_count_skips() -> None:
    state = next_loss_scale(None, initial_loss_scale(None), jnp.bool_(False))
    assert state == LossScale(jnp.float32(1), jnp.int32(0), jnp.int32(1), jnp.int32(1))
