"""Where GLM meets the pipeline: its embed, block and head as the engine's functions, and the shard_map around them."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax import model
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig, transformer
from glm_jax.model.layers import row_keys
from glm_jax.model.positions import position_terms
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel import partition, tensor, zero
from glm_jax.parallel.pipeline import run, schedule
from glm_jax.parallel.pipeline.stage import Keep
from glm_jax.parallel.tensor import ShardedAxis

Array = jax.Array
Batch = Mapping[str, Array]
Normalization = Literal["tokens", "microbatch"]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """All that gradients depend on besides arrays and the mesh; hashable."""

    model: GLMConfig
    num_tokens: int  # real rows of the padded vocabulary; the rest never gets probability
    objectives: int  # how many a row's `objective` may name
    compute: str = "float32"  # dtype of weights and activations
    schedule: str = "1f1b"
    keep: Keep = "layer"
    normalization: Normalization = "tokens"
    shrink_logits: bool = False  # the embedding gradient shrink on the head's path, too
    zero: Literal[1, 3] = 1  # 3: the blocks' weights, too, stay split over `data`, gathered a layer at a time


class Sums(NamedTuple):
    """Loss in nats and target tokens, summed over rows, by objective [O]; float32."""

    loss: Array
    targets: Array


class Gradients(NamedTuple):
    """What one pass over a global batch gives."""

    gradients: Any  # of the mean loss, float32, laid out as the master params
    sums: Sums
    activation_rms: Array  # float32 [L padded], of the residual stream after each layer, over the rows' places
    executed: Array  # int32 [data, P, tensor, 2]: block runs of each device in forward and in backward slots


def check(cfg: EngineConfig, mesh: jax.sharding.Mesh, global_batch: int, microbatches: int, length: int) -> None:
    """Check that the model and the batch can be laid over the mesh.

    Raises:
        UserError: naming the axis, the number and the nearest that work.
    """
    sizes, glm = dict(mesh.shape), cfg.model
    if glm.num_layers < sizes["pipeline"]:
        raise UserError(
            f"mesh.pipeline={sizes['pipeline']} is more stages than model.num_layers ({glm.num_layers}) can fill: "
            f"at most {glm.num_layers}"
        )
    if cfg.zero == 3 and (sizes["pipeline"] > 1 or cfg.keep == "all"):
        what = f"mesh.pipeline={sizes['pipeline']}" if sizes["pipeline"] > 1 else "pipeline.stash=all"
        raise UserError(
            f"mesh.zero=3 gathers each layer's weights in every slot and does not go with {what}: use mesh.zero=1, or "
            "mesh.pipeline=1 and pipeline.stash=layer"
        )
    meshes.check_divides(
        sizes,
        [
            ("tensor", "model.num_heads", glm.num_heads),
            ("tensor", "model.ffn_size", glm.ffn_size),
            ("tensor", "data.seq_length", length),
            ("data", "rows of a microbatch, train.global_batch / train.microbatches,", global_batch // microbatches),
        ],
    )
    shards = sizes["pipeline"] * sizes["tensor"]
    if glm.vocab_size % shards:
        raise UserError(
            f"mesh.pipeline x mesh.tensor={shards} does not divide the padded vocabulary ({glm.vocab_size}): "
            f"{meshes.nearest(shards, glm.vocab_size)} would, or a model.vocab_multiple that {shards} divides"
        )


def state_specs(cfg: GLMConfig, mesh: jax.sharding.Mesh) -> Any:
    """Give the PartitionSpecs of master params, gradients and each moment."""
    return partition.state_specs(model.logical_axes(cfg), cfg.hidden_size, mesh.shape["data"])


def functions(
    cfg: EngineConfig, axis: ShardedAxis, specs: Any, key: Array | None, shrink: Array | None
) -> run.Functions:
    """Bind GLM to the engine.

    Args:
        cfg: static.
        axis: the mesh's tensor axis.
        specs: of the params.
        key: the step's dropout key; None for no dropout.
        shrink: alpha of the embedding gradient shrink, see `transformer.embed`.
    """
    glm = cfg.model

    def embed(outer: Any, batch: Batch) -> Array:
        rows = row_keys(key, batch["row"])  # [B]
        return transformer.embed(glm, outer, batch["tokens"], batch["positions"], shrink, rows, axis)  # [B, S, D]

    def prepare(batch: Batch) -> Any:
        allowed = model.visibility(batch["segments"], batch["context"])  # [B, S, S]
        return allowed, position_terms(glm, batch["positions"], jnp.dtype(cfg.compute)), row_keys(key, batch["row"])

    def block(weights: Any, x: Array, terms: Any, layer: Array) -> Array:
        allowed, positions, rows = terms
        if cfg.zero == 3:
            weights = zero.gather_layer(weights, specs["blocks"], cfg.compute)
        return transformer.block(glm, weights, x, allowed, positions, layer, rows, axis=axis)[0]  # [B, S, D]

    def head(outer: Any, x: Array, batch: Batch) -> tuple[Array, Sums]:
        losses = _token_losses(cfg, axis, outer, x, batch, shrink if cfg.shrink_logits else None)  # [B, S]
        of_objective = jax.nn.one_hot(batch["objective"], cfg.objectives, dtype=losses.dtype)  # [B, O]
        rows, counts = losses.sum(-1), batch["loss_mask"].sum(-1)  # [B] both
        return (rows * row_weights(cfg, counts)).sum(), Sums(rows @ of_objective, counts @ of_objective)

    return run.Functions(prepare, embed, block, head)


def _token_losses(
    cfg: EngineConfig, axis: ShardedAxis, outer: Any, x: Array, batch: Batch, shrink: Array | None = None
) -> Array:
    logits = transformer.head(cfg.model, outer, x, axis, shrink)  # [B, S, V / shards]
    return tensor.token_losses(logits, batch["targets"], cfg.num_tokens) * batch["loss_mask"]  # [B, S]


def row_weights(cfg: EngineConfig, counts: Array) -> Array:
    """Give the factor of each row's summed loss before the global normaliser, for its target tokens `counts`.

    `tokens` weighs every target token alike. `microbatch` weighs every row alike, as the reference does: it takes the
    mean of each microbatch, of one row, and the mean of these.
    """
    return jnp.ones_like(counts) if cfg.normalization == "tokens" else 1.0 / jnp.maximum(counts, 1.0)


class _Layout(NamedTuple):
    """What a pass over a batch follows from besides arrays."""

    specs: Any
    table: schedule.Schedule
    axis: ShardedAxis
    batch: dict[str, Array]
    batch_specs: dict[str, jax.P]


def _layout(cfg: EngineConfig, mesh: jax.sharding.Mesh, batch: Batch) -> _Layout:
    sizes = dict(mesh.shape)
    microbatches, rows = batch["tokens"].shape[:2]
    return _Layout(
        specs=state_specs(cfg.model, mesh),
        table=schedule.build(cfg.schedule, sizes["pipeline"], microbatches),
        axis=ShardedAxis(sizes["tensor"], sizes["pipeline"] * sizes["tensor"]),
        batch={**batch, "row": jnp.arange(microbatches * rows, dtype=jnp.int32).reshape(microbatches, rows)},
        batch_specs={name: partition.batch_spec(array.ndim) for name, array in batch.items()}
        | {"row": partition.batch_spec(2)},
    )


def _split(tree: Any) -> tuple[Any, Any]:
    """Part what embedding and head use from the blocks."""
    return {name: tree[name] for name in tree if name != "blocks"}, tree["blocks"]


def _weights(cfg: EngineConfig, params: Any, specs: Any) -> run.Weights:
    outer, blocks = (
        zero.gather(part, part_specs, cfg.compute)
        for part, part_specs in zip(_split(params), _split(specs), strict=True)
    )
    return run.Weights(outer, params["blocks"] if cfg.zero == 3 else blocks)


def _reduce(cfg: EngineConfig, sums: run.Weights, specs: Any) -> Any:
    outer_specs, block_specs = _split(specs)
    blocks = zero.reduce(sums.blocks, block_specs, scattered=cfg.zero == 3)
    return {**zero.reduce(sums.outer, outer_specs), "blocks": blocks}


def value_and_grad(
    cfg: EngineConfig,
    mesh: jax.sharding.Mesh,
    params: Any,
    batch: Batch,
    key: Array | None = None,
    shrink: Array | float | None = None,
    loss_scale: Array | float = 1.0,
) -> Gradients:
    """Give loss sums and the gradients of the mean loss over a global batch, under the mesh's parallelism.

    Args:
        cfg: static.
        mesh: see `check` for what it must divide.
        params: float32 master params, blocks padded to the stages (`partition.pad_layers`).
        batch: arrays [M, B/M, ...], see data/batches.py.
        key: dropout key of the step; row b of the global batch draws as the b-th row does in `model.apply`.
        shrink: alpha of the embedding gradient shrink.
        loss_scale: the loss is multiplied by it inside; the gradients are divided by it.
    """
    layout = _layout(cfg, mesh, batch)

    def local(params: Any, batch: Batch, extras: Any) -> Gradients:
        key, shrink, loss_scale = extras
        counts = batch["loss_mask"].sum(-1)  # [M, B]
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
        squares = lax.pmean(result.squares, ("data", "tensor")) / layout.table.microbatches  # [Q]
        executed = result.executed[None, None, None]
        return Gradients(gradients, lax.psum(result.metrics, "data"), jnp.sqrt(squares), executed)

    wide = jnp.promote_types(cfg.compute, jnp.float32)
    in_specs = (layout.specs, layout.batch_specs, jax.P())
    out_specs: Any = (layout.specs, jax.P(), jax.P("pipeline"), jax.P("data", "pipeline", "tensor"))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=Gradients(*out_specs))
    return mapped(params, layout.batch, (key, shrink, jnp.asarray(loss_scale, wide)))


def losses(cfg: EngineConfig, mesh: jax.sharding.Mesh, params: Any, batch: Batch) -> Array:
    """Give the loss in nats of every target token: float32 [M, B/M, S], 0 elsewhere.

    Arguments as in `value_and_grad`; no dropout.
    """
    layout = _layout(cfg, mesh, batch)

    def local(params: Any, batch: Batch) -> Array:
        glm = functions(cfg, layout.axis, layout.specs, None, None)

        def head(outer: Any, x: Array, batch: Batch) -> tuple[Array, Array]:
            token_losses = _token_losses(cfg, layout.axis, outer, x, batch)  # [B, S]
            return token_losses.sum(), token_losses

        weights = _weights(cfg, params, layout.specs)
        return run.evaluate(glm._replace(head=head), layout.table, weights, batch, cfg.model.num_layers)

    in_specs = (layout.specs, layout.batch_specs)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=partition.batch_spec(3))
    return mapped(params, layout.batch)
