"""TrainState, and the pure functions that advance it: train_step and eval_step."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from glm_jax import model
from glm_jax.data.blanks import OBJECTIVES
from glm_jax.model import GLMConfig
from glm_jax.model.layers import at_least_float32
from glm_jax.parallel import partition
from glm_jax.training import optimizer, precision
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.precision import LossScale, Precision

Array = jax.Array
Batch = Mapping[str, Array]


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """All that a step depends on besides its arrays; hashable."""

    model: GLMConfig
    optimizer: OptimizerConfig
    precision: Precision
    num_tokens: int  # real rows of the padded vocabulary; the rest never gets probability
    seed: int


class TrainState(NamedTuple):
    """What a run is made of between two steps; params and moments are float32."""

    step: Array  # int32, optimizer steps taken
    samples: Array  # int32, rows seen: where the data and the learning rate stand
    params: Any
    moments: Any
    loss_scale: LossScale


class Sums(NamedTuple):
    """Loss in nats and target tokens, summed over rows, by objective [O]; float32."""

    loss: Array
    targets: Array


def init_state(cfg: StepConfig) -> TrainState:
    """Make the state before the first step."""
    params = model.init(cfg.model, jax.random.key(cfg.seed))
    moments = optimizer.transformation(cfg.optimizer).init(params)
    return TrainState(jnp.int32(0), jnp.int32(0), params, moments, precision.initial_loss_scale(cfg.precision))


def state_specs(cfg: StepConfig) -> TrainState:
    """Give the PartitionSpec of every array of the state: moments lie as their params do, scalars everywhere."""
    params = partition.specs(model.logical_axes(cfg.model))
    structure = jax.tree.structure(params, is_leaf=lambda leaf: isinstance(leaf, jax.P))
    state = jax.eval_shape(lambda: init_state(cfg))

    def follow(subtree: Any) -> Any:
        return params if jax.tree.structure(subtree) == structure else jax.P()

    return jax.tree.map(follow, state, is_leaf=lambda subtree: jax.tree.structure(subtree) == structure)


def create_state(cfg: StepConfig, mesh: jax.sharding.Mesh) -> TrainState:
    """Make the state on the mesh, each device its own part."""
    shardings = partition.shardings(mesh, state_specs(cfg))
    return jax.jit(lambda: init_state(cfg), out_shardings=shardings)()


def token_losses(logits: Array, targets: Array, num_tokens: int) -> Array:
    """Give the cross-entropy in nats of targets [B, S] under logits [B, S, V], float32 [B, S].

    The rows of the vocabulary from `num_tokens` on are padding and get no probability.
    """
    logits = at_least_float32(logits)
    real = jnp.arange(logits.shape[-1]) < num_tokens  # [V]
    logits = jnp.where(real, logits, jnp.finfo(logits.dtype).min)  # [B, S, V]
    chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]  # [B, S]
    return jax.nn.logsumexp(logits, axis=-1) - chosen  # [B, S]


def loss_sums(cfg: StepConfig, weights: Any, batch: Batch, key: Array | None) -> tuple[Array, Sums]:
    """Sum the loss of one microbatch of rows [B, S]; the first value is what is differentiated, a float32 scalar."""
    allowed = model.visibility(batch["segments"], batch["context"])  # [B, S, S]
    logits = model.apply(cfg.model, weights, batch["tokens"], batch["positions"], allowed, key=key)  # [B, S, V]
    losses = token_losses(logits, batch["targets"], cfg.num_tokens) * batch["loss_mask"]  # [B, S]
    of_objective = jax.nn.one_hot(batch["objective"], len(OBJECTIVES), dtype=losses.dtype)  # [B, O]
    rows, counts = losses.sum(-1), batch["loss_mask"].sum(-1)  # [B] both
    return rows.sum(), Sums(rows @ of_objective, counts @ of_objective)


def gradient_sums(cfg: StepConfig, weights: Any, batch: Batch, key: Array, scale: Array) -> tuple[Any, Sums]:
    """Sum scaled float32 gradients and losses over the microbatches of batch [M, B/M, ...]."""

    def scaled(weights: Any, microbatch: Batch, key: Array) -> tuple[Array, Sums]:
        loss, sums = loss_sums(cfg, weights, microbatch, key)
        return loss * scale, sums

    def add(carry: tuple[Any, Sums], scanned: tuple[Batch, Array]) -> tuple[tuple[Any, Sums], None]:
        microbatch, index = scanned
        gradients, sums = jax.grad(scaled, has_aux=True)(weights, microbatch, jax.random.fold_in(key, index))
        return jax.tree.map(lambda total, new: total + new.astype(total.dtype), carry, (gradients, sums)), None

    zeros = jax.tree.map(lambda weight: jnp.zeros(weight.shape, jnp.float32), weights)
    none = jnp.zeros(len(OBJECTIVES), jnp.float32)
    indices = jnp.arange(batch["tokens"].shape[0])
    return jax.lax.scan(add, (zeros, Sums(none, none)), (dict(batch), indices))[0]


def train_step(cfg: StepConfig, state: TrainState, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
    """Take one optimizer step.

    Args:
        cfg: static.
        state: before the step.
        batch: arrays [M, B/M, ...], see data/batches.py.

    Returns:
        The state after it, and metrics: `sums` (see `Sums`), and the scalars `lr`, `grad_norm`, `loss_scale`, `tokens`
        (row tokens, padding excluded) and `skipped` (non-finite steps so far). A step whose gradients are not all
        finite changes nothing but the loss scale and the counters.
    """
    rows = batch["tokens"].shape[0] * batch["tokens"].shape[1]
    samples = state.samples + rows
    scale = state.loss_scale.scale
    key = jax.random.fold_in(jax.random.key(cfg.seed), state.step)
    weights = precision.cast(state.params, cfg.precision.compute)
    gradients, sums = gradient_sums(cfg, weights, batch, key, scale)
    targets = jnp.maximum(sums.targets.sum(), 1.0)
    gradients = jax.tree.map(lambda gradient: gradient / (targets * scale), gradients)
    lr = optimizer.learning_rate(cfg.optimizer, samples)
    params, moments, norms = optimizer.update(cfg.optimizer, gradients, state.moments, state.params, lr)
    finite = jnp.isfinite(norms["grad_norm"])
    params, moments = jax.tree.map(
        lambda new, old: jnp.where(finite, new, old), (params, moments), (state.params, state.moments)
    )
    metrics = {
        "sums": sums,
        "lr": lr,
        "loss_scale": scale,
        "tokens": (batch["segments"] > 0).sum(),
        **norms,
    }
    loss_scale = precision.next_loss_scale(cfg.precision, state.loss_scale, finite)
    metrics["skipped"] = loss_scale.skipped
    return TrainState(state.step + 1, samples, params, moments, loss_scale), metrics


def eval_step(cfg: StepConfig, params: Any, batch: Batch) -> Array:
    """Give the loss in nats of every target token of a microbatch [1, B, ...]: float32 [B, S], 0 elsewhere."""
    batch = {name: array[0] for name, array in batch.items()}
    allowed = model.visibility(batch["segments"], batch["context"])  # [B, S, S]
    weights = precision.cast(params, cfg.precision.compute)
    logits = model.apply(cfg.model, weights, batch["tokens"], batch["positions"], allowed)  # [B, S, V]
    return token_losses(logits, batch["targets"], cfg.num_tokens) * batch["loss_mask"]  # [B, S]


def compile_steps(
    cfg: StepConfig, mesh: jax.sharding.Mesh
) -> tuple[Callable[[TrainState, Batch], tuple[TrainState, dict[str, Any]]], Callable[[Any, Batch], Array]]:
    """Bind both steps to a mesh. The train step takes over the memory of the state that it is given."""
    shardings = partition.shardings(mesh, state_specs(cfg))
    whole = jax.NamedSharding(mesh, jax.P())
    train = jax.jit(
        lambda state, batch: train_step(cfg, state, batch), donate_argnums=0, out_shardings=(shardings, whole)
    )
    evaluate = jax.jit(lambda params, batch: eval_step(cfg, params, batch), out_shardings=whole)
    return train, evaluate
