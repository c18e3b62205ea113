"""Arrays of several processes, whole."""

from typing import Any

import jax
import numpy as np

from glm_jax.parallel import processes


def whole(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Return the whole arrays of a tree that lies on a mesh of several processes, as numpy arrays."""
    copy = jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P()))
    gathered = processes.compiled_together(copy)(tree)
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), gathered)
