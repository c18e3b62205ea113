"""The learning rate's shape, what decays, clipping, and AdamW's update against numbers worked out by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.training import optimizer
from glm_jax.training.optimizer import OptimizerConfig, learning_rate

CONFIG = OptimizerConfig(peak_lr=1.0, min_lr=0.1, warmup_samples=100, decay_samples=300)


@pytest.mark.parametrize("samples, expected", [(0, 0), (50, 0.5), (100, 1), (200, 0.55), (300, 0.1), (9999, 0.1)])
def test_learning_rate_warms_up_then_falls_as_a_cosine_to_its_floor(samples: int, expected: float) -> None:
    assert learning_rate(CONFIG, jnp.int32(samples)) == pytest.approx(expected, abs=1e-6)


def test_no_warmup_starts_at_the_peak() -> None:
    assert learning_rate(OptimizerConfig(1.0, 0.1, 0, 300), jnp.int32(0)) == 1.0


def test_norms_and_biases_do_not_decay_and_the_embedding_does() -> None:
    params = {"embedding": {"word": 0}, "norm": {"scale": 0, "bias": 0}, "up": {"kernel": 0, "bias": 0}}
    assert optimizer.decays(params) == {
        "embedding": {"word": True},
        "norm": {"scale": False, "bias": False},
        "up": {"kernel": True, "bias": False},
    }


def test_first_update_is_adamws_with_clipped_gradients() -> None:
    cfg = OptimizerConfig(clip_norm=1.0, weight_decay=0.1, epsilon=1e-2)
    params = {"up": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}}
    gradients = {"up": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}}
    moments = optimizer.transformation(cfg).init(params)
    new, _, norms = optimizer.update(cfg, gradients, moments, params, jnp.float32(0.1))
    assert norms["grad_norm"] == pytest.approx(5.0)
    # clipped to (0.6, 0, 0.8); the first Adam direction is g / (|g| + epsilon)
    np.testing.assert_allclose(new["up"]["kernel"], [1 - 0.1 * (0.6 / 0.61 + 0.1), -2 + 0.1 * 0.2], rtol=1e-5)
    np.testing.assert_allclose(new["up"]["bias"], [0.5 - 0.1 * 0.8 / 0.81], rtol=1e-5)


def test_small_gradients_are_not_clipped() -> None:
    cfg = OptimizerConfig(clip_norm=10.0, weight_decay=0.0, epsilon=1.0)
    params = {"bias": jnp.array([0.0])}
    new, _, _ = optimizer.update(
        cfg, {"bias": jnp.array([3.0])}, optimizer.transformation(cfg).init(params), params, jnp.float32(1.0)
    )
    np.testing.assert_allclose(new["bias"], [-3 / 4], rtol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(params)
