"""Compute dtype, and the dynamic loss scale that float16 needs, as a pure state machine (paper table 11)."""

from __future__ import annotations

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.config import Config

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Precision:
    """The dtype of weights and activations, and the loss scale's constants; without float16 the scale stays 1."""

    compute: str = "float32"
    initial_scale: float = 2.0**16
    window: int = 2000  # good steps in a row that double the scale
    hysteresis: int = 2  # bad steps that halve it
    minimum_scale: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> Precision:
        """Read `train.precision` and the section `train.loss_scale`."""
        scale = config.train.loss_scale
        return cls(config.train.precision, scale.initial, scale.window, scale.hysteresis, scale.minimum)


class LossScale(NamedTuple):
    """The state of the dynamic loss scale: scalars."""

    scale: Array  # float32
    good_steps: Array  # int32, finite steps since the last change
    hysteresis: Array  # int32, how many more non-finite steps until the scale is halved
    skipped: Array  # int32, non-finite steps of the whole run


def initial_loss_scale(cfg: Precision) -> LossScale:
    """Start at the initial scale, or at 1 where the compute dtype needs none."""
    scale = cfg.initial_scale if cfg.compute == "float16" else 1.0
    return LossScale(jnp.float32(scale), jnp.int32(0), jnp.int32(cfg.hysteresis), jnp.int32(0))


def next_loss_scale(cfg: Precision, state: LossScale, finite: Array) -> LossScale:
    """Make the transition after a step whose gradients were all `finite` (bool scalar), or not.

    A non-finite step uses up one of the hysteresis; when none is left it halves the scale, down to the minimum. A
    window of finite steps in a row doubles the scale and restores the hysteresis (DeepSpeed's rule).
    """
    skipped = state.skipped + jnp.where(finite, 0, 1)
    if cfg.compute != "float16":
        return state._replace(skipped=skipped)
    good_steps = jnp.where(finite, state.good_steps + 1, 0)
    grows = good_steps >= cfg.window
    halves = ~finite & (state.hysteresis <= 1)
    halved = jnp.maximum(state.scale / 2, cfg.minimum_scale)
    scale = jnp.where(grows, state.scale * 2, jnp.where(halves, halved, state.scale))
    spent = jnp.where(finite, state.hysteresis, jnp.maximum(state.hysteresis - 1, 1))
    hysteresis = jnp.where(grows, cfg.hysteresis, spent)
    return LossScale(scale, jnp.where(grows, 0, good_steps), hysteresis, skipped)
