"""Gathers arrays from several processes."""

from typing import Any

import jax
import numpy as np

from glm_jax.parallel import processes


def whole(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Return the arrays of a tree on a mesh of several processes whole, as numpy arrays."""
    copy = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
    gathered = processes.compiled_together(copy)(tree)
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), gathered)
