"""float16 through the real step: the loss scale by a hand-computed trace, and batches that poison the gradients."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.parallel import mesh
from glm_jax.training.precision import LossScaleConfig
from glm_jax.training.state import TrainState
from glm_jax.training.step import controls
from tests.training.test_step import CONFIG, LR, Compiled, compiled, make_batch

pytestmark = pytest.mark.slow

SCALE = LossScaleConfig(initial=1024.0, window=3, hysteresis=2, minimum=1.0)
HALF = dataclasses.replace(CONFIG, engine=dataclasses.replace(CONFIG.engine, compute="float16"), loss_scale=SCALE)

# By hand, with a window of 3 and a hysteresis of 2: the outcome of each step (x: gradients that are not finite), the
# scale after it, and the steps skipped so far. The first overflow is forgiven; each further one halves the scale, until
# three good steps in a row double it and restore the hysteresis.
TRACE = (
    (".", 1024, 0), ("x", 1024, 1), (".", 1024, 1), ("x", 512, 2), ("x", 256, 3), (".", 256, 3), (".", 256, 3),
    (".", 512, 3), ("x", 512, 4), (".", 512, 4), (".", 512, 4), (".", 1024, 4), ("x", 1024, 5), ("x", 512, 6),
)  # fmt: skip


def take(made: Compiled, state: TrainState, poisoned: bool = False) -> tuple[TrainState, dict[str, Any]]:
    """Take a step; a poisoned batch has a target of infinite weight."""
    batch = make_batch()
    if poisoned:
        batch.loss_mask[0, 4] = np.inf
    state, metrics = made.train(state, mesh.place(made.mesh, batch, 4), controls(made.mesh, LR, 1.0), ())
    return state, jax.device_get(metrics)


def arrays(state: TrainState) -> Any:
    return jax.device_get((state.params, state.moments))


def equal(one: Any, other: Any) -> bool:
    return all(jax.tree.leaves(jax.tree.map(np.array_equal, one, other)))


def test_injected_overflows_follow_the_trace_and_change_nothing_else(mesh_sizes: dict[str, int]) -> None:
    made = compiled(HALF, mesh_sizes)
    state, used = made.state(), 1024
    for number, (outcome, scale, skipped) in enumerate(TRACE, 1):
        before = arrays(state)
        state, metrics = take(made, state, poisoned=outcome == "x")
        assert metrics["loss_scale"] == used and metrics["skipped"] == skipped
        assert float(state.loss_scale.scale) == scale and int(state.loss_scale.skipped) == skipped
        assert equal(arrays(state), before) == (outcome == "x")
        assert (int(state.step), int(state.samples)) == (number, 8 * number)
        used = scale


def test_a_scale_that_is_too_high_comes_down_until_a_step_succeeds(mesh_sizes: dict[str, int]) -> None:
    made = compiled(HALF, mesh_sizes)
    state, start = made.state(), 2.0**34
    high = jax.device_put(jnp.float32(start), state.loss_scale.scale.sharding)
    state = state._replace(loss_scale=state.loss_scale._replace(scale=high))
    before, skipped, metrics = arrays(state), 0, {}
    while equal(arrays(state), before):
        state, metrics = take(made, state)
        assert metrics["loss_scale"] == start / 2 ** max(skipped - 1, 0)  # the first is forgiven
        skipped = int(metrics["skipped"])
        assert skipped < 34
    assert skipped > 12  # 2^22 times a gradient of about 1 is far above 65,504, float16's largest
    assert np.isfinite(metrics["grad_norm"]) and state.loss_scale.scale == start / 2 ** (skipped - 1)


def test_a_poisoned_batch_leaves_no_trace_in_what_is_trained(mesh_sizes: dict[str, int]) -> None:
    made = compiled(HALF, mesh_sizes)
    state, clean = made.state(), made.state()
    for poisoned in (False, True, False):
        state, metrics = take(made, state, poisoned)
        assert np.isfinite(metrics["grad_norm"]) != poisoned
        if not poisoned:
            clean, _ = take(made, clean)
    assert equal(arrays(state), arrays(clean))
    assert (int(state.step), int(clean.step)) == (3, 2) and int(state.loss_scale.skipped) == 1


def test_without_a_loss_scale_a_poisoned_batch_is_survived_too(mesh_sizes: dict[str, int]) -> None:
    made = compiled(CONFIG, mesh_sizes)
    before = arrays(made.state())
    state, metrics = take(made, made.state(), poisoned=True)
    assert equal(arrays(state), before) and metrics["skipped"] == 1 and metrics["loss_scale"] == 1
