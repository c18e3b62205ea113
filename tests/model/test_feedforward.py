"""Our GELU and its derivative, against Python's erfc."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model.feedforward import geglu, gelu
from glm_jax.parallel import mesh

POINTS = np.array([-9.0, -5.0, -2.0, -0.75, -1e-3, 0.0, 0.5, 1.0, 3.0, 8.0])


def exact(x: float) -> tuple[float, float]:
    """Return x times the normal distribution's cdf, and its derivative by the product rule."""
    cdf = math.erfc(-x / math.sqrt(2)) / 2
    return x * cdf, cdf + x * math.exp(-x * x / 2) / math.sqrt(2 * math.pi)


@pytest.mark.parametrize("dtype, tolerance", [("float64", 1e-13), ("float32", 1e-5), ("float16", 2e-3)])
def test_gelu_and_its_derivative(dtype: str, tolerance: float) -> None:
    with jax.enable_x64(dtype == "float64"):
        points = jnp.asarray(POINTS, dtype)
        values, pull = jax.vjp(gelu, points)
        (slopes,) = pull(jnp.full_like(points, 3))
    assert values.dtype == slopes.dtype == jnp.dtype(dtype)
    expected = np.array([exact(float(x)) for x in np.asarray(points, np.float64)])
    rounding = 10 * float(jnp.finfo(dtype).eps)  # of 1 + erf, times x: the lower tail keeps no more
    np.testing.assert_allclose(values, expected[:, 0], rtol=tolerance, atol=rounding)
    np.testing.assert_allclose(slopes, 3 * expected[:, 1], rtol=tolerance, atol=3 * rounding)


def test_geglu_and_its_gradient() -> None:
    halves = jnp.array([[[0.5, -2.0, 3.0], [1.0, -0.75, 0.5]]])  # [1, 2, 3]
    values, pull = jax.vjp(geglu, halves)
    (gradient,) = pull(jnp.array([[1.0, 10.0, -2.0]]))
    (gelus, slopes), first = np.transpose([exact(gate) for gate in (1.0, -0.75, 0.5)]), np.array([0.5, -2.0, 3.0])
    np.testing.assert_allclose(values, [first * gelus], rtol=1e-5)
    factors = np.array([1.0, 10.0, -2.0])
    np.testing.assert_allclose(gradient, [[factors * gelus, factors * first * slopes]], rtol=1e-5)


def test_gelu_can_be_differentiated_where_varying_axes_are_tracked() -> None:
    grid = mesh.build({"data": 1, "pipeline": 1, "tensor": 1})

    def slope(x: jax.Array) -> jax.Array:
        return jax.grad(lambda x: gelu(x).sum())(x)

    mapped = jax.shard_map(slope, mesh=grid, in_specs=jax.P("tensor"), out_specs=jax.P("tensor"))
    np.testing.assert_allclose(mapped(jnp.array([0.5, -2.0])), [exact(0.5)[1], exact(-2.0)[1]], rtol=1e-5)
