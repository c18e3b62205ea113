"""TrainState, and the pure functions that advance it: train_step and eval_step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import model
from glm_jax.engine import passes
from glm_jax.engine.passes import EngineConfig
from glm_jax.parallel import partition
from glm_jax.training import optimizer, precision
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.precision import LossScale, LossScaleConfig

Array = jax.Array
Batch = Mapping[str, Array]
Mesh = jax.sharding.Mesh


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that a step depends on besides its arrays and the mesh; hashable."""

    engine: EngineConfig
    optimizer: OptimizerConfig
    loss_scale: LossScaleConfig | None  # None: the scale stays 1
    seed: int
    shrinks: bool = False  # whether `Controls.shrink` is heeded


class Controls(NamedTuple):
    """What the host decides for a step."""

    lr: Any  # float32 scalar
    shrink: Any  # float32 scalar, alpha of the embedding gradient shrink, see model.transformer.embed
    requests: Any  # int32 [devices], what each one's process asks of all; the largest comes back with the metrics


class TrainState(NamedTuple):
    """What a run is made of between two steps; params and moments are float32.

    In memory the layers are padded to the stages of the pipeline (`true_layers` undoes it for the disk), and params
    and moments are split over `data` as well (ZeRO-1).
    """

    step: Array  # int32, optimizer steps taken
    samples: Array  # int32, rows seen: where the data and the learning rate stand
    params: Any
    moments: Any
    loss_scale: LossScale


def _map_params(cfg: StepConfig, state: TrainState, change: Callable[[Any], Any], other: Callable[[Any], Any]) -> Any:
    """Apply `change` to the params and to each moment of their structure, `other` to every array beside them."""
    structure = jax.tree.structure(model.logical_axes(cfg.engine.model), is_leaf=lambda leaf: isinstance(leaf, tuple))

    def is_params(subtree: Any) -> bool:
        return jax.tree.structure(subtree) == structure

    return jax.tree.map(lambda part: change(part) if is_params(part) else other(part), state, is_leaf=is_params)


def init_state(cfg: StepConfig, stages: int = 1, key: Array | None = None) -> TrainState:
    """Make the state before the first step, its layers padded to `stages`; `key` by default follows from the seed."""
    axes = model.logical_axes(cfg.engine.model)
    key = jax.random.key(cfg.seed) if key is None else key
    params = partition.pad_layers(model.init(cfg.engine.model, key), axes, stages)
    moments = optimizer.transformation(cfg.optimizer).init(params)
    return TrainState(jnp.int32(0), jnp.int32(0), params, moments, precision.initial_loss_scale(cfg.loss_scale))


def state_specs(cfg: StepConfig, mesh: Mesh) -> TrainState:
    """Give the PartitionSpec of every array of the state: moments lie as their params do, scalars everywhere."""
    specs = passes.state_specs(cfg.engine.model, mesh)
    state = jax.eval_shape(lambda: init_state(cfg))
    return _map_params(cfg, state, lambda _: specs, lambda _: jax.P())


def true_layers(cfg: StepConfig, state: TrainState) -> TrainState:
    """Take away the layers that only fill up the stages."""
    axes, layers = model.logical_axes(cfg.engine.model), cfg.engine.model.num_layers
    return _map_params(cfg, state, lambda params: partition.true_layers(params, axes, layers), lambda array: array)


def pad_layers(cfg: StepConfig, state: TrainState, stages: int) -> TrainState:
    """Undo `true_layers` for a pipeline of `stages`."""
    axes = model.logical_axes(cfg.engine.model)
    return _map_params(cfg, state, lambda params: partition.pad_layers(params, axes, stages), lambda array: array)


def create_state(cfg: StepConfig, mesh: Mesh) -> TrainState:
    """Make the state on the mesh, each device its own part."""
    shardings = partition.shardings(mesh, state_specs(cfg, mesh))
    return jax.jit(lambda: init_state(cfg, mesh.shape["pipeline"]), out_shardings=shardings)()


def at_step(mesh: Mesh, state: TrainState, step: int, samples: int, loss_scale: LossScale | None = None) -> TrainState:
    """Give the state with other counters, and with another loss scale (but for its count of skipped steps)."""
    counters: Any = (np.int32(step), np.int32(samples), loss_scale or state.loss_scale)
    step_, samples_, scale = jax.device_put(jax.device_get(counters), jax.NamedSharding(mesh, jax.P()))
    return state._replace(step=step_, samples=samples_, loss_scale=scale._replace(skipped=state.loss_scale.skipped))


def controls(mesh: Mesh, lr: float, shrink: float, request: int = 0) -> Controls:
    """Put a step's controls on the mesh; `request` is this process's, the rest is the same in all of them."""
    sharding = jax.NamedSharding(mesh, jax.P(mesh.axis_names))
    requests = jax.make_array_from_callback((mesh.size,), sharding, lambda _: np.full(1, request, np.int32))
    return Controls(np.float32(lr), np.float32(shrink), requests)


def train_step(
    cfg: StepConfig, mesh: Mesh, state: TrainState, batch: Batch, controls: Controls
) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step.

    Args:
        cfg, mesh: static.
        state: before the step.
        batch: arrays [M, B/M, ...], see data/batches.py.
        controls: of this step.

    Returns:
        The state after it, and metrics: `sums` (see `engine.Sums`), `activation_rms` float32 [L] (see
        `engine.Gradients`), and the scalars `lr`, `loss_scale`, `tokens` (row tokens, padding excluded), `skipped`
        (non-finite steps so far), `requests` and the norms of optimizer.py. A step whose gradients are not all finite
        changes nothing but the loss scale and the counters.
    """
    glm = cfg.engine.model
    samples = state.samples + batch["tokens"].shape[0] * batch["tokens"].shape[1]
    drops = glm.attention_dropout or glm.hidden_dropout
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step) if drops else None
    scale = state.loss_scale.scale
    shrink = controls.shrink if cfg.shrinks else None
    passed = passes.value_and_grad(cfg.engine, mesh, state.params, batch, key, shrink, scale)
    params, moments, norms = optimizer.update(cfg.optimizer, passed.gradients, state.moments, state.params, controls.lr)
    finite = jnp.isfinite(norms["grad_norm"])
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, moments), (state.params, state.moments)
    )
    loss_scale = precision.next_loss_scale(cfg.loss_scale, state.loss_scale, finite)
    metrics = {
        "sums": passed.sums,
        "activation_rms": passed.activation_rms[: glm.num_layers],
        "lr": controls.lr,
        "loss_scale": scale,
        "tokens": (batch["segments"] > 0).sum(),
        "skipped": loss_scale.skipped,
        "requests": controls.requests.max(),
        **norms,
        **optimizer.group_norms(passed.gradients, glm.num_layers),
    }
    return TrainState(state.step + 1, samples, params, moments, loss_scale), metrics


def compile_steps(
    cfg: StepConfig, mesh: Mesh
) -> tuple[Callable[[TrainState, Batch, Controls], tuple[TrainState, dict[str, Any]]], Callable[[Any, Batch], Array]]:
    """Bind the train step, which takes over the memory of its state, and the evaluation to a mesh.

    The evaluation gives the loss in nats of every target token of a batch [M, B/M, ...]: float32 [M, B/M, S], 0
    elsewhere.
    """
    shardings = partition.shardings(mesh, state_specs(cfg, mesh))
    whole = jax.NamedSharding(mesh, jax.P())
    train = jax.jit(
        lambda state, batch, controls: train_step(cfg, mesh, state, batch, controls),
        donate_argnums=0,
        out_shardings=(shardings, whole),
    )
    evaluate = jax.jit(lambda params, batch: passes.losses(cfg.engine, mesh, params, batch), out_shardings=whole)
    return train, evaluate
