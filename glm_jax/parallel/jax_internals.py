"""Undocumented parts of jax that the pipeline uses; tests/parallel/test_jax_internals.py states what they must do.

A new version of jax may change any of them. Then only this file and its test need to change.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import jax

from glm_jax.types import Tree

Array = jax.Array


def varying_axes(x: Array | jax.ShapeDtypeStruct) -> frozenset[str]:
    """Return the mesh axes along which the devices' copies of x may differ."""
    return jax.typeof(x).manual_axis_type.varying


def without_arguments(pull: Tree, places: Iterable[int]) -> Tree:
    """Return a vjp function that no longer holds some of the arguments it was linearised at.

    As a pytree it then has only the other residuals. `with_arguments` makes it callable again.
    """
    for place in places:
        pull.args_res[place] = None
    return pull


def with_arguments(pull: Tree, arguments: Mapping[int, Tree]) -> Tree:
    """Return a vjp function with arguments put back in their places."""
    for place, argument in arguments.items():
        pull.args_res[place] = argument
    return pull
