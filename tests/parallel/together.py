"""What several processes compute together in tests, in step: gloo connects in half a minute or not at all."""

from typing import Any

import jax
import numpy as np

from glm_jax.parallel import processes


def together(function: Any, *arguments: Any) -> Any:
    """Compile a jitted function and wait until all processes have; then call it."""
    compiled = function.lower(*arguments).compile()
    processes.wait_for_all()
    return compiled(*arguments)


def whole(mesh: jax.sharding.Mesh, tree: Any) -> Any:
    """Give the whole arrays of a tree that lies on a mesh of several processes, as numpy arrays."""
    gathered = together(jax.jit(lambda tree: tree, out_shardings=jax.NamedSharding(mesh, jax.P())), tree)
    return jax.tree.map(lambda array: np.asarray(array.addressable_data(0)), gathered)
