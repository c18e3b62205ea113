"""The weights of a model as decoding holds them: every layer in arrays of its own, never split over `data`."""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.engine.bind import check_model
from glm_jax.model import GLMConfig, logical_axes, quantized
from glm_jax.model.attention_cores import Name
from glm_jax.model.quantized import Quantized
from glm_jax.parallel import partition
from glm_jax.types import Tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Everything that decoding depends on besides arrays and the mesh; hashable."""

    model: GLMConfig
    num_tokens: int  # real rows of the padded vocabulary; scores give the rest no probability
    compute: str = "float32"  # dtype of weights, activations and the cache
    attention: Name | None = None  # the core that reads contexts; None: chosen for the mesh's devices


class Weights(NamedTuple):
    """Weights on a mesh."""

    outer: Tree  # of embedding and head
    layers: tuple[Tree, ...]  # Q trees of arrays [P, ...]: the q-th layer of every stage


def specs(cfg: GLMConfig, weights: Weights) -> Weights:
    """Return the PartitionSpecs of weights, or of their shapes; the axis P of layers takes the place of L."""
    axes = logical_axes(cfg)
    blocks = axes.pop("blocks")
    layers = (partition.specs(quantized.logical_axes(blocks, layer)) for layer in weights.layers)
    return Weights(partition.specs(axes), tuple(layers))


def place(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Tree) -> Weights:
    """Place params on a mesh, in the dtype of the computation; quantised kernels stay as they are.

    Args:
        cfg: static.
        mesh: where to.
        params: as `model.init` returns them, on this mesh or small enough for each of its devices.

    Raises:
        UserError: the model does not fit the mesh.
    """
    check_model(cfg.model, mesh)
    params = _fitted(cfg, mesh, params)
    everywhere, devices = jax.NamedSharding(mesh, jax.P()), set(mesh.devices.flat)
    here = jax.tree.map(
        lambda array: array if set(array.devices()) == devices else jax.device_put(array, everywhere), params
    )
    return _split(cfg, mesh, here)


def shapes(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Tree) -> Weights:
    """Return the shapes of weights, with their shardings, as `place` puts params of these shapes on a mesh.

    Raises:
        UserError: the model does not fit the mesh.
    """
    check_model(cfg.model, mesh)
    split = jax.eval_shape(lambda params: _split(cfg, mesh, _fitted(cfg, mesh, params)), params)
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        split,
        partition.shardings(mesh, specs(cfg.model, split)),
    )


def _fitted(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Tree) -> Tree:
    members = {"heads": mesh.shape["tensor"], "ffn": mesh.shape["tensor"]}
    return quantized.fit(params, quantized.logical_axes(logical_axes(cfg.model), params), members)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _split(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Tree) -> Weights:
    stages = mesh.shape["pipeline"]
    held = partition.layers_held(cfg.model.num_layers, stages)

    def cast(leaf: Array | Quantized) -> Array | Quantized:
        return leaf if isinstance(leaf, Quantized) else leaf.astype(cfg.compute)

    def by_stage(array: Array) -> Array:
        empty = ((0, stages * held - array.shape[0]), *((0, 0),) * (array.ndim - 1))
        return jnp.pad(array, empty).reshape(stages, held, *array.shape[1:])

    outer = jax.tree.map(cast, params, is_leaf=quantized.is_quantized)
    blocks = jax.tree.map(by_stage, outer.pop("blocks"))
    layers = tuple(jax.tree.map(lambda array, q=q: array[:, q], blocks) for q in range(held))
    weights = Weights(outer, layers)
    return jax.lax.with_sharding_constraint(weights, partition.shardings(mesh, specs(cfg.model, weights)))
