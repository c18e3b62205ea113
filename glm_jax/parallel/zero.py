"""ZeRO-1 (arXiv 1910.02054): state is split over `data`; a step gathers weights first and scatters gradients last.

Both run inside a shard_map. In between, every device holds the whole weights of its stage and tensor part. Outside, the
optimizer works on the shards, since jit partitions it by the same specs. With zero=3 the blocks' weights are
gathered one layer at a time instead; this needs a mesh without a pipeline.
"""

from __future__ import annotations

from functools import partial

import jax
from jax import lax
from jax.typing import DTypeLike

from glm_jax.parallel import partition
from glm_jax.types import Tree

Array = jax.Array


def _gather(shard: Array, dimension: int) -> Array:
    # XLA would copy for an axis of one, and not always leave the order of dimensions as it is.
    alone = lax.axis_size("data") == 1
    return shard if alone else lax.all_gather(shard, "data", axis=dimension, tiled=True)


def _scatter(total: Array, dimension: int) -> Array:
    alone = lax.axis_size("data") == 1
    return total if alone else lax.psum_scatter(total, "data", scatter_dimension=dimension, tiled=True)


def gather(params: Tree, specs: Tree, dtype: DTypeLike) -> Tree:
    """Cast this device's shards of master params to the compute dtype and gather them over `data`.

    Args:
        params: shards, laid out by `specs`.
        specs: a PartitionSpec for each, from partition.state_specs.
        dtype: of the weights.
    """

    def one(param: Array, spec: jax.P) -> Array:
        weight, dimension = param.astype(dtype), partition.dimension(spec, "data")
        return weight if dimension is None else _gather(weight, dimension)

    return jax.tree.map(one, params, specs)


@partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def _gather_layer(shard: Array, dimension: int, dtype: DTypeLike) -> Array:
    return _gather(shard.astype(dtype), dimension)


def _scatter_layer(dimension: int, dtype: DTypeLike, shard: Array, gradient: Array) -> tuple[Array]:
    # Autodiff would sum in the compute dtype.
    return (_scatter(gradient.astype(shard.dtype), dimension),)


_gather_layer.defvjp(lambda shard, dimension, dtype: (_gather_layer(shard, dimension, dtype), shard), _scatter_layer)


def gather_layer(shards: Tree, specs: Tree, dtype: DTypeLike) -> Tree:
    """Gather one block's weights where they are used, as ZeRO-3 and FSDP do; the vjp sums and scatters gradients.

    Args:
        shards: float32 shards of one layer's params.
        specs: a PartitionSpec for the arrays of all layers, [L, ...].
        dtype: of the weights.
    """

    def one(shard: Array, spec: jax.P) -> Array:
        dimension = partition.dimension(spec, "data")
        return shard.astype(dtype) if dimension is None else _gather_layer(shard, dimension - 1, dtype)

    return jax.tree.map(one, shards, specs)


def reduce(gradients: Tree, specs: Tree, scattered: bool = False) -> Tree:
    """Sum gradients over all devices that share a parameter, and leave each device its shard: `gather` reversed.

    Args:
        gradients: this device's sums.
        specs: a PartitionSpec for each, from partition.state_specs.
        scattered: whether gradients split over `data` come from `gather_layer`, and so are shards already.
    """

    def one(gradient: Array, spec: jax.P) -> Array:
        replicated = tuple(axis for axis in ("pipeline", "tensor") if axis not in partition.mesh_axes(spec))
        dimension = partition.dimension(spec, "data")
        if dimension is None:
            return lax.psum(gradient, ("data", *replicated))
        if not scattered:
            gradient = _scatter(gradient, dimension)
        return lax.psum(gradient, replicated) if replicated else gradient

    return jax.tree.map(one, gradients, specs)
