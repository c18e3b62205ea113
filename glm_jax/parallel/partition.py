"""The one table from logical axes to mesh axes, and the PartitionSpecs that follow from it.

model/ names the logical axes of every parameter; jit, checkpoints and tests read the specs from here alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import jax

RULES: Mapping[str, str | None] = {
    # parameters
    "layers": "pipeline",
    "vocab": "tensor",
    "heads": "tensor",
    "ffn": "tensor",
    "hidden": None,
    # batches
    "microbatches": None,
    "rows": "data",
    "sequence": None,
}

BATCH_AXES = ("microbatches", "rows", "sequence")  # M, B/M, S; arrays of fewer axes take the first ones


def spec(axes: tuple[str | None, ...]) -> jax.P:
    """Turn the logical axes of one array into its PartitionSpec.

    Raises:
        KeyError: a logical axis that the table does not know.
    """
    return jax.P(*(None if axis is None else RULES[axis] for axis in axes))


def specs(axes: Any) -> Any:
    """Turn a tree of logical axes (`model.logical_axes`) into a tree of PartitionSpecs."""
    return jax.tree.map(spec, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))


def batch_spec(ndim: int) -> jax.P:
    """Give the PartitionSpec of a batch array [M, B/M, ...] of `ndim` axes; all but the first two stay whole."""
    return spec(BATCH_AXES[:2] + (None,) * (ndim - 2))


def shardings(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Bind a tree of PartitionSpecs to a mesh."""
    return jax.tree.map(
        lambda leaf: jax.NamedSharding(mesh, leaf), tree, is_leaf=lambda leaf: isinstance(leaf, jax.P)
    )
