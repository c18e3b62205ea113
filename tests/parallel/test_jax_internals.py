"""What the pipeline expects of undocumented parts of jax; a new version that changes them should fail here first."""

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.parallel import mesh
from glm_jax.parallel.jax_internals import varying_axes, with_arguments, without_arguments


def test_arrays_know_the_axes_along_which_they_vary() -> None:
    grid = mesh.build({"data": 1, "pipeline": 1, "tensor": 1})
    seen = {}

    def body(split: jax.Array, whole: jax.Array) -> jax.Array:
        marked = jax.lax.pcast(whole, ("pipeline", "tensor"), to="varying")
        for name, array in (("split", split), ("whole", whole), ("marked", marked), ("both", split * marked),
                            ("summed", jax.lax.psum(split, "data"))):  # fmt: skip
            seen[name] = varying_axes(array)
        return jax.lax.psum(split * marked, grid.axis_names)

    mapped = jax.shard_map(body, mesh=grid, in_specs=(jax.P("data"), jax.P()), out_specs=jax.P())
    jax.eval_shape(mapped, jnp.ones(2), jnp.ones(2))
    assert seen == {
        "split": {"data"},
        "whole": set(),
        "marked": {"pipeline", "tensor"},
        "both": {"data", "pipeline", "tensor"},
        "summed": set(),
    }
    assert varying_axes(jnp.ones(2)) == frozenset()


def test_a_vjp_gives_arguments_up_and_takes_them_back() -> None:
    weights, x, scale = jnp.array([[1.0, 2.0], [3.0, 4.0]]), jnp.array([0.5, -1.0]), jnp.array([[2.0], [3.0]])
    y, pull = jax.vjp(
        lambda weights, x, scale: jnp.sin(weights["kernel"] @ x)[:, None] * scale, {"kernel": weights}, x, scale
    )
    held = without_arguments(pull, (0, 2))
    assert not any(np.array_equal(leaf, given) for leaf in jax.tree.leaves(held) for given in (weights, scale))
    leaves, structure = jax.tree.flatten(held)  # as the stash keeps it
    arguments = {0: {"kernel": jnp.array([[5.0, -1.0], [0.5, 2.0]])}, 2: jnp.array([[1.0], [-1.0]])}
    pull = with_arguments(jax.tree.unflatten(structure, leaves), arguments)
    of_weights, of_x, _ = pull(jnp.array([[1.0], [10.0]]))
    slope = np.cos([-1.5, -2.5]) * [1.0, -10.0]  # of the sine where it was linearised, times the new scale
    np.testing.assert_allclose(y[:, 0], np.sin([-1.5, -2.5]) * [2, 3], rtol=1e-6)
    np.testing.assert_allclose(of_weights["kernel"], np.outer(slope, [0.5, -1.0]), rtol=1e-6)
    np.testing.assert_allclose(of_x, np.array([[5.0, -1.0], [0.5, 2.0]]).T @ slope, rtol=1e-6)
