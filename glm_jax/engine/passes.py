"""Passes over a batch on a mesh: losses, or gradients of their mean, each in one shard_map."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.typing import ArrayLike

from glm_jax.data.rows.rows import Rows
from glm_jax.engine.bind import Array, Batch, EngineConfig, Sums, functions, row_weights, state_specs, token_losses
from glm_jax.parallel import partition, zero
from glm_jax.parallel.pipeline import run, schedule
from glm_jax.parallel.tensor import ShardedAxis
from glm_jax.types import Tree


class Gradients(NamedTuple):
    """The result of one pass over a global batch."""

    gradients: Tree  # of the mean loss, float32, laid out like the master params
    sums: Sums
    activation_rms: Array  # float32 [L padded], root mean square of the residual stream after each layer
    executed: Array  # int32 [data, P, tensor, 2]: each device's block runs in forward and in backward slots
    attention_scores: Array | None  # float32 [L padded], each layer's largest, see `transformer.largest_score`


class _Layout(NamedTuple):
    """How a batch and a model are laid out for a pass."""

    specs: Tree
    table: schedule.Schedule
    axis: ShardedAxis
    batch: Batch
    batch_specs: Batch


def _layout(cfg: EngineConfig, mesh: jax.sharding.Mesh, rows: Rows[Array]) -> _Layout:
    sizes = dict(mesh.shape)
    microbatches, size = rows.tokens.shape[:2]
    batch = Batch(rows, jnp.arange(microbatches * size, dtype=jnp.int32).reshape(microbatches, size))
    return _Layout(
        specs=state_specs(cfg.model, mesh),
        table=schedule.build(cfg.schedule, sizes["pipeline"], microbatches),
        axis=ShardedAxis(sizes["tensor"], sizes["pipeline"] * sizes["tensor"]),
        batch=batch,
        batch_specs=jax.tree.map(lambda array: partition.batch_spec(array.ndim), batch),
    )


def _split(tree: Tree) -> tuple[Tree, Tree]:
    """Split what embedding and head use from the blocks."""
    return {name: tree[name] for name in tree if name != "blocks"}, tree["blocks"]


def _weights(cfg: EngineConfig, params: Tree, specs: Tree) -> run.Weights:
    outer, blocks = (
        zero.gather(part, part_specs, cfg.compute)
        for part, part_specs in zip(_split(params), _split(specs), strict=True)
    )
    return run.Weights(outer, params["blocks"] if cfg.zero == 3 else blocks)


def _reduce(cfg: EngineConfig, sums: run.Weights, specs: Tree) -> Tree:
    outer_specs, block_specs = _split(specs)
    blocks = zero.reduce(sums.blocks, block_specs, scattered=cfg.zero == 3)
    return {**zero.reduce(sums.outer, outer_specs), "blocks": blocks}


def value_and_grad(
    cfg: EngineConfig,
    mesh: jax.sharding.Mesh,
    params: Tree,
    rows: Rows[Array],
    key: Array | None = None,
    shrink: ArrayLike | None = None,
    loss_scale: ArrayLike = 1.0,
) -> Gradients:
    """Return loss sums and the gradients of the mean loss over a global batch, computed in parallel on the mesh.

    Args:
        cfg: static.
        mesh: one that passes `bind.check`.
        params: float32 master params, their blocks padded to the stages (`partition.pad_layers`).
        rows: the global batch, arrays [M, B/M, ...].
        key: the step's dropout key; row b of the global batch draws what row b draws in `model.apply`.
        shrink: alpha of the embedding gradient shrink.
        loss_scale: multiplies the loss inside; the returned gradients are divided by it.
    """
    layout = _layout(cfg, mesh, rows)

    def local(params: Tree, batch: Batch, extras: Tree) -> Gradients:
        key, shrink, loss_scale = extras
        counts = batch.rows.loss_mask.sum(-1)  # [M, B]
        total = lax.psum((counts * row_weights(cfg, counts)).sum(), "data")  # target tokens, or rows with any
        result = run.value_and_grad(
            functions(cfg, layout.axis, layout.specs, key, shrink),
            layout.table,
            _weights(cfg, params, layout.specs),
            batch,
            layers=cfg.model.num_layers,
            keep=cfg.keep,
            seed=loss_scale / jnp.maximum(total, 1.0),
        )
        sums = _reduce(cfg, result.gradients, layout.specs)
        gradients = jax.tree.map(lambda total: total / loss_scale, sums)
        squares, largest = result.measures  # [Q] each
        squares = lax.pmean(squares, ("data", "tensor")) / layout.table.microbatches  # [Q]
        scores = None if largest is None else lax.pmax(largest, ("data", "tensor"))  # [Q]
        executed = result.executed[None, None, None]
        return Gradients(gradients, lax.psum(result.metrics, "data"), jnp.sqrt(squares), executed, scores)

    wide = jnp.promote_types(cfg.compute, jnp.float32)
    in_specs = (layout.specs, layout.batch_specs, jax.P())
    by_layer, by_device = jax.P("pipeline"), jax.P("data", "pipeline", "tensor")
    out_specs: Tree = (layout.specs, jax.P(), by_layer, by_device, by_layer if cfg.attention_scores else None)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=Gradients(*out_specs))
    return mapped(params, layout.batch, (key, shrink, jnp.asarray(loss_scale, wide)))


def losses(cfg: EngineConfig, mesh: jax.sharding.Mesh, params: Tree, rows: Rows[Array]) -> Array:
    """Return the loss in nats of every target token: float32 [M, B/M, S], 0 elsewhere.

    Arguments as in `value_and_grad`; no dropout.
    """
    layout = _layout(cfg, mesh, rows)

    def local(params: Tree, batch: Batch) -> Array:
        glm = functions(cfg, layout.axis, layout.specs, None, None)

        def head(outer: Tree, x: Array, batch: Batch) -> tuple[Array, Array]:
            of_tokens = token_losses(cfg, layout.axis, outer, x, batch.rows)  # [B, S]
            return of_tokens.sum(), of_tokens

        weights = _weights(cfg, params, layout.specs)
        return run.evaluate(glm._replace(head=head, look=None), layout.table, weights, batch, cfg.model.num_layers)

    in_specs = (layout.specs, layout.batch_specs)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=partition.batch_spec(3))
    return mapped(params, layout.batch)
