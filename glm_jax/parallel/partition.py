"""The only table from logical axes to mesh axes, and the PartitionSpecs that follow from it.

model/ names the logical axes of every parameter. jit, shard_map, checkpoints and the planner all take their specs from
here. There are two sets: `specs` for the weights as the computation holds them, and `state_specs` for the state (master
params and moments), which is also split over `data` (ZeRO-1, arXiv 1910.02054).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.types import Tree

RULES: Mapping[str, str | tuple[str, ...] | None] = {
    # parameters
    "layers": "pipeline",
    "vocab": ("pipeline", "tensor"),
    "heads": "tensor",
    "ffn": "tensor",
    "hidden": None,
    # batches
    "microbatches": None,
    "rows": "data",
    "sequence": None,
}
STATE_RULES = {**RULES, "hidden": "data"}  # every parameter has a hidden axis, except the biases of sharded features

BATCH_AXES = ("microbatches", "rows")  # M, B/M; further axes stay whole


def _is_axes(leaf: object) -> bool:
    """Whether a leaf names logical axes: a plain tuple, unlike the states of optax."""
    return type(leaf) is tuple and all(name is None or isinstance(name, str) for name in leaf)


def spec(axes: tuple[str | None, ...], rules: Mapping[str, str | tuple[str, ...] | None] = RULES) -> jax.P:
    """Turn the logical axes of one array into its PartitionSpec.

    Raises:
        KeyError: the table lacks a logical axis.
    """
    return jax.P(*(None if axis is None else rules[axis] for axis in axes))


def specs(axes: Tree) -> Tree:
    """Turn a tree of logical axes (`model.logical_axes`) into the specs of the weights in the computation."""
    return jax.tree.map(spec, axes, is_leaf=_is_axes)


def state_specs(axes: Tree, hidden: int, data: int) -> Tree:
    """Return the specs of master params, and of moments of the same shapes.

    Args:
        axes: from `model.logical_axes`.
        hidden: the size of the logical axis `hidden`; if `data` does not divide it, state is not split over `data`.
        data: the size of the mesh's axis `data`.
    """
    rules = RULES if hidden % data else STATE_RULES
    return jax.tree.map(lambda leaf: spec(leaf, rules), axes, is_leaf=_is_axes)


def batch_spec(ndim: int) -> jax.P:
    """Return the PartitionSpec of a batch array [M, B/M, ...] with `ndim` axes; all but the first two stay whole."""
    return spec(BATCH_AXES + (None,) * (ndim - 2))


def shardings(mesh: jax.sharding.Mesh, tree: Tree) -> Tree:
    """Bind a tree of PartitionSpecs to a mesh."""
    return jax.tree.map(lambda leaf: jax.NamedSharding(mesh, leaf), tree, is_leaf=lambda leaf: isinstance(leaf, jax.P))


def moved(axis: str, specs: Tree, shapes: Tree, sizes: Mapping[str, int]) -> Tree:
    """Return the specs with a mesh axis moved off the dimension that it splits alone.

    It splits the largest dimension of what a device holds that it divides, after the axes that split this dimension
    already, so that moving exchanges data only along `axis`. An array without such a dimension becomes whole along it.

    Args:
        axis: of the mesh.
        specs: PartitionSpecs, with an entry for each dimension where they split one over `axis`.
        shapes: of arrays or abstract arrays, in the same tree.
        sizes: of the mesh's axes.
    """

    def one(spec: jax.P, array: jax.ShapeDtypeStruct) -> jax.P:
        left = dimension(spec, axis)
        if left is None:
            return spec
        entries: list[tuple[str, ...]] = [(e,) if isinstance(e, str) else tuple(e or ()) for e in spec]
        entries[left] = ()
        held = [
            size // math.prod(sizes[name] for name in entry) for size, entry in zip(array.shape, entries, strict=True)
        ]
        fits = [index for index, size in enumerate(held) if index != left and size % sizes[axis] == 0]
        if fits:
            entries[max(fits, key=lambda index: held[index])] += (axis,)
        return jax.P(*(entry[0] if len(entry) == 1 else entry or None for entry in entries))

    return jax.tree.map(one, specs, shapes, is_leaf=lambda leaf: isinstance(leaf, jax.P))


def mesh_axes(spec: jax.P) -> set[str]:
    """Return the mesh axes that a spec uses."""
    return {axis for entry in spec if entry is not None for axis in ((entry,) if isinstance(entry, str) else entry)}


def dimension(spec: jax.P, axis: str) -> int | None:
    """Return the dimension of an array that is split over this mesh axis alone, or None."""
    return list(spec).index(axis) if axis in spec else None


def layers_held(layers: int, stages: int) -> int:
    """Return Q, the number of layers that every stage has room for: L / P, rounded up."""
    return -(-layers // stages)


def stage_layers(layers: int, stages: int) -> tuple[range, ...]:
    """Return the layers of each stage. The last stages have fewer, or none, and padding in their place.

    >>> stage_layers(7, 3)
    (range(0, 3), range(3, 6), range(6, 7))
    """
    held = layers_held(layers, stages)
    starts = (min(stage * held, layers) for stage in range(stages))
    return tuple(range(start, min(start + held, layers)) for start in starts)


def pad_layers(params: Tree, axes: Tree, stages: int) -> Tree:
    """Pad arrays [L, ...] of blocks with zeros to [P Q, ...], their shape in memory; disks keep the true shape."""
    return _map_layers(params, axes, lambda array: _pad(array, stages * layers_held(array.shape[0], stages)))


def true_layers(params: Tree, axes: Tree, layers: int) -> Tree:
    """Undo `pad_layers`: cut arrays [P Q, ...] of blocks to [L, ...]."""
    return _map_layers(params, axes, lambda array: array[:layers])


def _map_layers(params: Tree, axes: Tree, change: Callable[[jax.Array], jax.Array]) -> Tree:
    return jax.tree.map(
        lambda leaf, array: change(array) if "layers" in leaf else array, axes, params, is_leaf=_is_axes
    )


def _pad(array: jax.Array, length: int) -> jax.Array:
    widths = [(0, length - array.shape[0])] + [(0, 0)] * (array.ndim - 1)
    return jnp.pad(array, widths)


class Part(NamedTuple):
    """One device's part of an array."""

    path: str
    shape: tuple[int, ...]
    spec: jax.P
    bytes: int


def parts(shapes: Tree, specs: Tree, sizes: Mapping[str, int]) -> Iterator[Part]:
    """Yield path, whole shape, spec and bytes a device of every array, for `config show --specs` and the planner.

    Args:
        shapes: of arrays or abstract arrays.
        specs: a PartitionSpec for each.
        sizes: of the mesh's axes.
    """
    leaves = jax.tree_util.tree_leaves_with_path(shapes)
    flat_specs = jax.tree.leaves(specs, is_leaf=lambda leaf: isinstance(leaf, jax.P))
    for (path, array), array_spec in zip(leaves, flat_specs, strict=True):
        devices = int(np.prod([sizes[axis] for axis in mesh_axes(array_spec)]))
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        yield Part(name, array.shape, array_spec, array.size * array.dtype.itemsize // devices)
