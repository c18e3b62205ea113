"""What the backward pass should find: as much as fits in a share of the devices' memory."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp

from glm_jax import model
from glm_jax.data.rows.rows import Rows
from glm_jax.engine.bind import EngineConfig, remembering
from glm_jax.model import Visibility, attention_cores, transformer
from glm_jax.model.positions import position_terms
from glm_jax.parallel.devices import device_memory
from glm_jax.parallel.jax_internals import without_arguments
from glm_jax.parallel.pipeline.stage import Keep
from glm_jax.types import Tree

BUDGET = 0.25  # of a device's memory; the rest is for the state, its gradients, logits and the work of a layer


def choose(cfg: EngineConfig, mesh: jax.sharding.Mesh, rows: int, length: int, memory: int) -> Keep:
    """Return what `auto` keeps for the backward pass.

    This is the results of products if the mesh has one stage and they fit in the budget, else the inputs of layers: in
    a pipeline each stage would keep them for several microbatches. Everything takes more memory, and the elementwise
    work that it saves is little.

    Args:
        cfg: the model and its options; `keep` is not read.
        mesh: one that passes `bind.check`.
        rows: of a microbatch on all devices.
        length: S.
        memory: bytes of a device.
    """
    if mesh.shape["pipeline"] > 1 or cfg.zero == 3:
        return "layer"
    return "products" if products_bytes(cfg, mesh, rows, length) <= BUDGET * memory else "layer"


def describe(cfg: EngineConfig, mesh: jax.sharding.Mesh, rows: int, length: int) -> str:
    """Say what `auto` chose for a single stage, and the memory that products take; rows as in `choose`."""
    gigabytes = [size / 1e9 for size in (products_bytes(cfg, mesh, rows, length), BUDGET * device_memory())]
    chosen = "the results of products" if cfg.keep == "products" else f"the input of each {cfg.keep}"
    return (
        f"the backward pass finds {chosen} (pipeline.stash): "
        f"products are {gigabytes[0]:,.2f} GB a device, of {gigabytes[1]:,.2f} GB to be used for them"
    )


def products_bytes(cfg: EngineConfig, mesh: jax.sharding.Mesh, rows: int, length: int) -> int:
    """Return the bytes on each device of the products for one microbatch, if all layers are on one stage."""
    of_layer = layer_bytes(dataclasses.replace(cfg, keep="products"), rows // mesh.shape["data"], length)
    return cfg.model.num_layers * of_layer // mesh.shape["tensor"]


@functools.lru_cache(maxsize=8)  # a run builds its engine several times
def layer_bytes(cfg: EngineConfig, rows: int, length: int) -> int:
    """Return the bytes kept of one layer for a microbatch of `rows` rows, if no axis of the mesh splits it.

    `cfg.keep` is `products` or `all`. The bytes are read off the vjp of a block, as the pipeline's stage keeps it.
    """
    glm, dtype = cfg.model, jnp.dtype(cfg.compute)

    def kept() -> Tree:
        weights = jax.tree.map(lambda array: array[0].astype(dtype), model.init(glm, jax.random.key(0))["blocks"])
        batch = Rows.abstract((rows, length), two_streams=glm.position == "learned_2d")
        batch = jax.tree.map(lambda shape: jnp.zeros(shape.shape, shape.dtype), batch)
        terms = (Visibility(batch.segments, batch.context), position_terms(glm, batch.positions, dtype))

        drops = glm.attention_dropout or glm.hidden_dropout
        keys = jax.random.split(jax.random.key(0), rows) if drops else None

        def block(weights: Tree, x: jax.Array, terms: tuple[Visibility, Tree]) -> jax.Array:
            core = attention_cores.CORES[cfg.attention]
            return transformer.block(glm, weights, x, *terms, jnp.int32(0), keys, core=core)[0]  # [B, S, D]

        x = jnp.zeros((rows, length, glm.hidden_size), dtype)
        return without_arguments(jax.vjp(remembering(cfg, block), weights, x, terms)[1], (0, 2))

    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(jax.eval_shape(kept)))
