"""The dynamic loss scale that float16 needs, as a pure state machine (paper table 11)."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.config.training import LossScaleConfig

Array = jax.Array


class LossScale(NamedTuple):
    """The state of the dynamic loss scale: scalars."""

    scale: Array  # float32
    good_steps: Array  # int32, finite steps since the last change
    hysteresis: Array  # int32, how many more non-finite steps until the scale is halved
    skipped: Array  # int32, non-finite steps of the whole run


def initial_loss_scale(cfg: LossScaleConfig | None) -> LossScale:
    """Return the initial scale, or a scale of 1 where none is needed."""
    scale, hysteresis = (cfg.initial, cfg.hysteresis) if cfg else (1.0, 1)
    return LossScale(jnp.float32(scale), jnp.int32(0), jnp.int32(hysteresis), jnp.int32(0))


def next_loss_scale(cfg: LossScaleConfig | None, state: LossScale, finite: Array) -> LossScale:
    """Return the state after a step; `finite`, bool [], tells whether all its gradients were finite.

    A non-finite step lowers the hysteresis by one; at 1 it halves the scale instead, down to the minimum. A window of
    finite steps in a row doubles the scale and restores the hysteresis (DeepSpeed's rule).
    """
    skipped = state.skipped + jnp.where(finite, 0, 1)
    if cfg is None:
        return state._replace(skipped=skipped)
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grows = good_steps >= cfg.window
    halves = ~finite & (state.hysteresis <= 1)
    scale = jnp.where(grows, state.scale * 2, jnp.where(halves, state.scale / 2, state.scale))
    scale = jnp.maximum(scale, cfg.minimum)  # immediately if an operator has raised the minimum
    spent = jnp.where(finite, state.hysteresis, jnp.maximum(state.hysteresis - 1, 1))
    hysteresis = jnp.where(grows, cfg.hysteresis, spent)
    return LossScale(scale, jnp.where(grows, 0, good_steps), hysteresis, skipped)
