"""Pure functions of a TrainState: the train step, and the evaluation of its params."""

from __future__ import annotations

from typing import NamedTuple

import jax
import numpy as np

from glm_jax.data.rows.rows import Rows
from glm_jax.engine import passes
from glm_jax.model.groups import of_params
from glm_jax.parallel import partition
from glm_jax.parallel.processes import Jitted
from glm_jax.training import optimizer, precision
from glm_jax.training.state import StepConfig, TrainState, model_params, state_specs
from glm_jax.types import Tree

Array = jax.Array
Mesh = jax.sharding.Mesh


class Controls(NamedTuple):
    """What the host decides for a step; float32 unless noted."""

    lr: Array | np.float32  # []
    shrink: Array | np.float32  # [], alpha of the embedding gradient shrink, see model.transformer.embed
    requests: Array  # int32 [devices], the request of each one's process; the largest returns in the metrics


def controls(mesh: Mesh, lr: float, shrink: float, request: int = 0) -> Controls:
    """Put a step's controls on the mesh; `request` is this process's own, the others are the same in all processes."""
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    requests = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, request, np.int32))
    return Controls(np.float32(lr), np.float32(shrink), requests)


def train_step(
    cfg: StepConfig, mesh: Mesh, state: TrainState, rows: Rows[Array], controls: Controls, base: Tree = ()
) -> tuple[TrainState, dict[str, Tree]]:
    """Take one optimizer step.

    Args:
        cfg, mesh: static.
        state: before the step.
        rows: the global batch, arrays [M, B/M, ...].
        controls: of this step.
        base: the model's params if `state` has adapters of them, see `state.create_base`.

    Returns:
        The state after the step, and metrics: `sums` (see `engine.Sums`), `activation_rms` and, if asked for,
        `attention_scores`, float32 [L] (see `passes.Gradients`), and the scalars `lr`, `loss_scale`, `tokens` (row
        tokens, padding excluded), `skipped` (non-finite steps so far), `requests` and the norms of optimizer.py. A step
        that `optimizer.update` does not take changes only the loss scale and the counters.
    """
    glm = cfg.engine.model
    samples = state.samples + rows.tokens.shape[0] * rows.tokens.shape[1]
    drops = glm.attention_dropout or glm.hidden_dropout
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if drops else None
    scale = state.loss_scale.scale
    shrink = controls.shrink if cfg.shrinks else None
    whole, to_trained = jax.vjp(lambda params: model_params(cfg, params, base), state.params)
    passed = passes.value_and_grad(cfg.engine, mesh, whole, rows, key, shrink, scale)
    (gradients,) = to_trained(passed.gradients)
    multipliers = of_params(cfg.groups, glm, state.params)
    updated = optimizer.update(cfg.optimizer, gradients, state.moments, state.params, controls.lr, multipliers)
    loss_scale = precision.next_loss_scale(cfg.loss_scale, state.loss_scale, updated.finite)
    metrics = {
        "sums": passed.sums,
        "activation_rms": passed.activation_rms[: glm.num_layers],
        "lr": controls.lr,
        "loss_scale": scale,
        "tokens": (rows.segments > 0).sum(),
        "skipped": loss_scale.skipped,
        "requests": controls.requests.max(),
        **updated.norms,
        **optimizer.group_norms(passed.gradients, glm.num_layers),
    }
    if passed.attention_scores is not None:
        metrics["attention_scores"] = passed.attention_scores[: glm.num_layers]
    return TrainState(state.step + 1, samples, updated.params, updated.moments, loss_scale), metrics


def compile_steps(
    cfg: StepConfig, mesh: Mesh
) -> tuple[
    Jitted[[TrainState, Rows[Array], Controls, Tree], tuple[TrainState, dict[str, Tree]]],
    Jitted[[Tree, Tree, Rows[Array]], Array],
]:
    """Return the train step and the evaluation, jitted for a mesh.

    The train step donates its state; it takes the base last, () without LoRA. The evaluation takes a state's `params`,
    the base and rows [M, B/M, ...], and returns the loss in nats of every target token: float32 [M, B/M, S], 0
    elsewhere.
    """
    shardings = partition.shardings(mesh, state_specs(cfg, mesh))
    whole = jax.NamedSharding(mesh, jax.P())
    train = jax.jit(
        lambda state, rows, controls, base: train_step(cfg, mesh, state, rows, controls, base),
        donate_argnums=0,
        out_shardings=(shardings, whole),
    )
    evaluate = jax.jit(
        lambda params, base, rows: passes.losses(cfg.engine, mesh, model_params(cfg, params, base), rows),
        out_shardings=whole,
    )
    return train, evaluate
