"""ZeRO-1 (arXiv 1910.02054): state lies split over `data`; a step gathers weights first and scatters gradients last.

Both run inside a shard_map. Between the two, every device holds whole weights of its stage and tensor part; outside,
the optimizer works on the shards, as jit partitions it by the same specs.
"""

from __future__ import annotations

from typing import Any

import jax
from jax import lax

from glm_jax.parallel import partition

Array = jax.Array
Tree = Any


def gather(params: Tree, specs: Tree, dtype: Any) -> Tree:
    """Cast this device's shards of master params to the compute dtype and gather them over `data`.

    Args:
        params: shards, as `specs` (of partition.state_specs) lays them out.
        specs: a PartitionSpec for each.
        dtype: of the weights.
    """

    def one(param: Array, spec: jax.P) -> Array:
        weight, dimension = param.astype(dtype), partition.dimension(spec, "data")
        return weight if dimension is None else lax.all_gather(weight, "data", axis=dimension, tiled=True)

    return jax.tree.map(one, params, specs)


def reduce(gradients: Tree, specs: Tree) -> Tree:
    """Sum gradients over all devices that share a parameter, and leave each with its shard: `gather` backwards.

    This is the only reduction over `data` in a step.
    """

    def one(gradient: Array, spec: jax.P) -> Array:
        replicated = tuple(axis for axis in ("pipeline", "tensor") if axis not in partition.mesh_axes(spec))
        dimension = partition.dimension(spec, "data")
        if dimension is None:
            return lax.psum(gradient, ("data", *replicated))
        gradient = lax.psum_scatter(gradient, "data", scatter_dimension=dimension, tiled=True)
        return lax.psum(gradient, replicated) if replicated else gradient

    return jax.tree.map(one, gradients, specs)
