"""Runs a pipeline schedule inside one jitted program: losses and gradients of a model given as functions.

Everything here runs in the body of a shard_map that is manual over all axes of the mesh. A `lax.scan` walks the rows of
the schedule's table. In each tick a stage may run one microbatch forward through its blocks and one backward (see
stage.py); then two ppermutes send activations to the next stage and gradients to the previous one. Sums stay on each
device throughout the loop; the caller reduces them over `data` once, after it.

With one stage this is plain gradient accumulation, one microbatch a tick.
"""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.parallel.pipeline.schedule import Schedule
from glm_jax.parallel.pipeline.stage import Functions, Keep, Result, Stage, Weights, at, put, when, zeros
from glm_jax.types import Tree

Array = jax.Array


class Carry(NamedTuple):
    """What one tick passes to the next."""

    x: Array  # from the previous stage
    gradient: Array  # from the next stage
    outputs: Array  # [output_ring, ...]: outputs of the last stage that await their backward
    stash: list[Array]  # [ring * Q, ...] (or [ring, ...]): what forward slots keep for backward slots
    result: Result


def shift(x: Array, stages: int) -> Array:
    """Send x to the stage `stages` further, around the ring."""
    count = lax.axis_size("pipeline")
    return lax.ppermute(x, "pipeline", [(stage, (stage + stages) % count) for stage in range(count)])


def value_and_grad(
    functions: Functions, schedule: Schedule, weights: Weights, batch: Tree, layers: int, keep: Keep, seed: Array
) -> Result:
    """Run `schedule` and sum gradients and metrics over all microbatches. Call it inside a shard_map.

    Args:
        functions: the model.
        schedule: one whose stages match the size of the mesh's axis `pipeline`.
        weights: this device's; arrays of blocks are [Q, ...], with the same Q on every stage.
        batch: this device's rows, arrays [M, ...].
        layers: L of the whole model; blocks beyond it are inert.
        keep: what forward slots keep; backward slots compute the rest again.
        seed: float32 [], where the gradient of each microbatch's loss starts: a loss scale over a normaliser.
    """
    stage, index = Stage(functions, weights, batch, layers, keep), lax.axis_index("pipeline")
    ring = schedule.ring

    def tick(carry: Carry, rows: tuple[Array, Array]) -> tuple[Carry, None]:
        forward, backward = rows  # int32 [P] each
        x, gradient, outputs, stash, result = carry
        x = stage.enter(forward[0], x)
        x, stash, measures, ran_forward = stage.forward(forward[index], x, stash, result.measures, ring)
        outputs = when(forward[index], lambda outputs: put(outputs, x, forward[index] % outputs.shape[0]), outputs)
        gradient, result = stage.head(backward[-1], outputs, gradient, result, seed)
        outer, blocks = result.gradients
        gradient, blocks, ran_backward = stage.backward(backward[index], gradient, stash, blocks, ring)
        outer = stage.embed_gradient(backward[0], gradient, outer)
        executed = result.executed + jnp.stack([ran_forward, ran_backward])
        result = Result(Weights(outer, blocks), result.metrics, measures, executed)
        return Carry(shift(x, 1), shift(gradient, -1), outputs, stash, result), None

    blank = zeros(stage.x)
    outputs = zeros(stage.x, (schedule.output_ring,))
    start = Carry(blank, blank, outputs, stage.empty_stash(ring), stage.empty_result())
    tables = jnp.array(schedule.forward, jnp.int32), jnp.array(schedule.backward, jnp.int32)  # [ticks, P] each
    return lax.scan(tick, start, tables)[0].result


def evaluate(functions: Functions, schedule: Schedule, weights: Weights, batch: Tree, layers: int) -> Tree:
    """Run all microbatches forward only. Call it inside a shard_map; arguments as in `value_and_grad`.

    Returns:
        The head's metrics of each microbatch, stacked: arrays [M, ...].
    """
    stage, index = Stage(functions, weights, batch, layers, "stage"), lax.axis_index("pipeline")

    def tick(carry: tuple[Array, Tree], forward: Array) -> tuple[tuple[Array, Tree], None]:
        x, metrics = carry
        x = stage.enter(forward[0], x)
        x = stage.forward(forward[index], x, stage.empty_stash(1), stage.empty_measures(), 1)[0]

        def show(metrics: Tree) -> Tree:
            entry = stage.loss(stage.weights.outer, x, at(batch, forward[-1]))[1]
            return put(metrics, entry, forward[-1])

        metrics = when(forward[-1], show, metrics)
        return (shift(x, 1), metrics), None

    metrics = jax.eval_shape(lambda: stage.loss(stage.weights.outer, zeros(stage.x), at(batch, 0))[1])
    rows = jnp.array(schedule.forward, jnp.int32)[: schedule.microbatches + schedule.stages - 1]  # [M + P - 1, P]
    return lax.scan(tick, (zeros(stage.x), zeros(metrics, (schedule.microbatches,))), rows)[0][1]
