"""Undocumented parts of jax that the pipeline uses; tests/parallel/test_jax_internals.py states what they must do.

A new version of jax may change any of them. Then only this file and its test need to change.
"""

from __future__ import annotations

import jax

from glm_jax.types import Tree

Array = jax.Array


def varying_axes(x: Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the mesh axes along which the devices' copies of x may differ."""
    return jax.typeof(x).manual_axis_type.varying


def without_first_argument(pull: Tree) -> Tree:
    """Return a vjp function that no longer holds the first argument it was linearised at.

    As a pytree it then has only the residuals. `with_first_argument` makes it callable again.
    """
    pull.args_res[0] = None
    return pull


def with_first_argument(pull: Tree, argument: Tree) -> Tree:
    """Return a vjp function with its first argument put back."""
    pull.args_res[0] = argument
    return pull
