"""Binds GLM's embed, block and head as the functions that the pipeline runs."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import model
from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.rows import Rows
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig, attention_cores, transformer
from glm_jax.model.layers import PRODUCT, row_keys
from glm_jax.model.positions import PositionTerms, position_terms
from glm_jax.parallel import cross_entropy, partition, zero
from glm_jax.parallel.mesh import check_divides, nearest
from glm_jax.parallel.pipeline import run
from glm_jax.parallel.pipeline.stage import Keep
from glm_jax.parallel.tensor import ShardedAxis
from glm_jax.types import Tree

Array = jax.Array
Normalization = Literal["tokens", "microbatch"]
Terms = tuple[model.Visibility, PositionTerms, Array | None]  # what the blocks share; the last are dropout keys [B]


@dataclasses.dataclass(frozen=True)
class EngineConfig:
    """Everything gradients depend on besides arrays and the mesh; hashable."""

    model: GLMConfig
    num_tokens: int  # real rows of the padded vocabulary; the rest get no probability
    objectives: int  # how many there are for a row's `objective`
    compute: str = "float32"  # dtype of weights and activations
    schedule: str = "1f1b"
    keep: Keep = "layer"
    normalization: Normalization = "tokens"
    z_loss: float = 0.0  # see `cross_entropy.weighted`
    shrink_logits: bool = False  # apply the embedding gradient shrink on the head's path too
    attention: attention_cores.Name = "reference"
    attention_scores: bool = False  # whether gradients come with each layer's largest score
    zero: Literal[1, 3] = 1  # 3: the blocks' weights also stay split over `data`, gathered one layer at a time


class Batch(NamedTuple):
    """What the pipeline passes to the functions: rows, and their numbers in the global batch."""

    rows: Rows[Array]
    number: Array  # int32 [B]; the dropout keys follow from it


class Sums(NamedTuple):
    """Loss in nats and target tokens, summed over rows, by objective [O]; float32."""

    loss: Array
    targets: Array


def loss_metrics(sums: Sums) -> dict[str, float]:
    """Turn sums by objective into `loss` and `loss/<objective>`, nats a target token; leave out absent objectives."""
    losses, targets = np.asarray(sums.loss, np.float64), np.asarray(sums.targets, np.float64)
    metrics = {"loss": float(losses.sum() / max(targets.sum(), 1.0))}
    for name, loss, count in zip(OBJECTIVES, losses, targets, strict=True):
        if count:
            metrics[f"loss/{name}"] = float(loss / count)
    return metrics


def check(cfg: EngineConfig, mesh: jax.sharding.Mesh, global_batch: int, microbatches: int, length: int) -> None:
    """Check that the model and the batch fit the mesh.

    Raises:
        UserError: names the axis, the number and the nearest that work.
    """
    check_model(cfg.model, mesh)
    sizes = dict(mesh.shape)
    if cfg.zero == 3 and (sizes["pipeline"] > 1 or cfg.keep in ("products", "all")):
        what = f"mesh.pipeline={sizes['pipeline']}" if sizes["pipeline"] > 1 else f"pipeline.stash={cfg.keep}"
        raise UserError(
            f"mesh.zero=3 gathers each layer's weights in every slot and cannot be combined with {what}: use "
            "mesh.zero=1, or mesh.pipeline=1 and pipeline.stash=layer"
        )
    check_divides(
        sizes,
        [
            ("tensor", "data.seq_length", length),
            ("data", "rows of a microbatch, train.global_batch / train.microbatches,", global_batch // microbatches),
        ],
    )


def check_model(glm: GLMConfig, mesh: jax.sharding.Mesh) -> None:
    """Check that a model fits the mesh.

    Raises:
        UserError: names the axis, the number and the nearest that work.
    """
    sizes = dict(mesh.shape)
    if glm.num_layers < sizes["pipeline"]:
        raise UserError(
            f"mesh.pipeline={sizes['pipeline']} is more stages than model.num_layers ({glm.num_layers}) can fill: "
            f"at most {glm.num_layers}"
        )
    heads_and_features = [("tensor", "model.num_heads", glm.num_heads), ("tensor", "model.ffn_size", glm.ffn_size)]
    check_divides(sizes, heads_and_features)
    shards = sizes["pipeline"] * sizes["tensor"]
    if glm.vocab_size % shards:
        raise UserError(
            f"mesh.pipeline x mesh.tensor={shards} does not divide the padded vocabulary ({glm.vocab_size}): "
            f"{nearest(shards, glm.vocab_size)} would, or a model.vocab_multiple that {shards} divides"
        )


def state_specs(cfg: GLMConfig, mesh: jax.sharding.Mesh) -> Tree:
    """Return the PartitionSpecs of master params, gradients and each moment."""
    return partition.state_specs(model.logical_axes(cfg), cfg.hidden_size, mesh.shape["data"])


def functions(
    cfg: EngineConfig, axis: ShardedAxis, specs: Tree, key: Array | None, shrink: Array | None
) -> run.Functions:
    """Bind GLM as the pipeline's functions.

    Args:
        cfg: static.
        axis: the mesh's tensor axis.
        specs: of the params.
        key: the step's dropout key; None for no dropout.
        shrink: alpha of the embedding gradient shrink, see `transformer.embed`.
    """
    glm, core = cfg.model, attention_cores.CORES[cfg.attention]

    def embed(outer: Tree, batch: Batch) -> Array:
        rows = row_keys(key, batch.number)  # [B]
        return transformer.embed(glm, outer, batch.rows.tokens, batch.rows.positions, shrink, rows, axis)  # [B, S, D]

    def prepare(batch: Batch) -> Terms:
        rows = batch.rows
        terms = position_terms(glm, rows.positions, jnp.dtype(cfg.compute))
        return model.Visibility(rows.segments, rows.context), terms, row_keys(key, batch.number)

    def whole(weights: Tree) -> Tree:
        return zero.gather_layer(weights, specs["blocks"], cfg.compute) if cfg.zero == 3 else weights

    def block(weights: Tree, x: Array, terms: Terms, layer: Array) -> Array:
        allowed, positions, rows = terms
        weights = whole(weights)
        return transformer.block(glm, weights, x, allowed, positions, layer, rows, axis=axis, core=core)[0]  # [B, S, D]

    def look(weights: Tree, x: Array, terms: Terms, layer: Array) -> Array:
        allowed, positions, _ = terms
        return transformer.largest_score(glm, whole(weights), x, allowed, positions, layer, axis)  # []

    def head(outer: Tree, x: Array, batch: Batch) -> tuple[Array, Sums]:
        mask, counts = batch.rows.loss_mask, batch.rows.loss_mask.sum(-1)  # [B, S], [B]
        x, word = transformer.before_logits(glm, outer, x, axis, shrink if cfg.shrink_logits else None)
        weights = mask * row_weights(cfg, counts)[:, None]  # [B, S]
        targets = batch.rows.targets
        loss, losses = cross_entropy.weighted(x, word, targets, weights, cfg.num_tokens, cfg.z_loss)  # [], [B, S]
        of_objective = jax.nn.one_hot(batch.rows.objective, cfg.objectives, dtype=losses.dtype)  # [B, O]
        return loss, Sums((losses * mask).sum(-1) @ of_objective, counts @ of_objective)

    return run.Functions(prepare, embed, remembering(cfg, block), head, look if cfg.attention_scores else None)


def remembering(cfg: EngineConfig, block: Callable[..., Array]) -> Callable[..., Array]:
    """Return a block whose vjp keeps what `cfg.keep` says, if the stage is to keep all that the vjp keeps.

    With `products` this is what model/ names so, the results of matrix products and of attention. Elementwise work
    gives the rest (close to the selective recomputation of arXiv 2205.05198).
    """
    if cfg.keep != "products":
        return block
    return jax.checkpoint(block, policy=jax.checkpoint_policies.save_only_these_names(PRODUCT))


def token_losses(cfg: EngineConfig, axis: ShardedAxis, outer: Tree, x: Array, rows: Rows[Array]) -> Array:
    """Return the loss in nats of every target token, 0 elsewhere: x [B, S, D] -> float32 [B, S]."""
    x, word = transformer.before_logits(cfg.model, outer, x, axis)  # [B, S, D], [V / shards, D]
    return cross_entropy.losses(x, word, rows.targets, cfg.num_tokens) * rows.loss_mask  # [B, S]


def row_weights(cfg: EngineConfig, counts: Array) -> Array:
    """Return the factor of each row's summed loss before the global normaliser, for its target tokens `counts`.

    `tokens` weighs every target token alike. `microbatch` weighs every row alike, like the reference, which takes the
    mean over each microbatch of one row, then the mean of these means.
    """
    return jnp.ones_like(counts) if cfg.normalization == "tokens" else 1.0 / jnp.maximum(counts, 1.0)
