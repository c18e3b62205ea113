"""model/ in float64 against numpy_reference.py, for every normalisation, position and activation."""

from collections.abc import Iterator
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest

from glm_jax.config.model import Activation, Norm, Position
from glm_jax.model import GLMConfig, Visibility, apply, init

STEP = 1e-4  # of the finite differences, along directions of size about 1 in each entry


@pytest.fixture(autouse=True)
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def sample(cfg: GLMConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return two rows: one with a blank at 2, filled from place 5 on, and a [gMASK] row of two packed samples."""
    random = np.random.default_rng(1)
    tokens = random.integers(0, cfg.vocab_size, (2, 9))
    segments = np.array([[1] * 9, [1] * 5 + [2] * 4])
    context = np.array([[1, 1, 1, 1, 1, 0, 0, 0, 0], [1, 1, 1, 0, 0, 1, 1, 0, 0]], bool)
    positions = np.array([[0, 1, 2, 3, 4, 2, 2, 2, 2], [0, 1, 2, 3, 4, 0, 1, 2, 3]])
    if cfg.position == "learned_2d":
        inside = np.array([[0, 0, 0, 0, 0, 1, 2, 3, 4], [0, 0, 0, 1, 2, 0, 0, 1, 2]])
        positions = np.stack([positions, inside], axis=1)
    return tokens, positions, np.asarray(Visibility(jnp.asarray(segments), jnp.asarray(context)).dense())


def noise(tree: Any, seed: int) -> Any:
    random = np.random.default_rng(seed)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape), tree)


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("position", get_args(Position))
@pytest.mark.parametrize("activation", get_args(Activation))
def test_logits_and_gradients(norm: Any, position: Any, activation: Any) -> None:
    cfg = GLMConfig(2, 12, 3, 10, 17, 9, norm=norm, position=position, activation=activation,
                    embedding_norm=activation == "gelu", qk_norm=activation == "gelu_tanh")  # fmt: skip
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    params = jax.tree.map(lambda leaf: 0.4 * leaf, noise(shapes, 0))
    inputs = sample(cfg)
    mixture = np.random.default_rng(2).standard_normal((2, 9, 17))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = apply(cfg, params, *map(jnp.asarray, inputs))
        return jnp.sum(mixture * jnp.tanh(logits)), logits

    with jax.disable_jit():  # compiling 36 models takes longer than running them op by op
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    assert logits.dtype == np.float64
    np.testing.assert_allclose(logits, numpy_reference.forward(cfg, params, *inputs), rtol=0, atol=1e-10)

    def reference_loss(direction: Any, step: float) -> float:
        moved = jax.tree.map(lambda leaf, change: leaf + step * change, params, direction)
        return float(np.sum(mixture * np.tanh(numpy_reference.forward(cfg, moved, *inputs))))

    direction = noise(shapes, 3)
    near, far = (
        (reference_loss(direction, step) - reference_loss(direction, -step)) / (2 * step) for step in (STEP, 2 * STEP)
    )
    expected = (4 * near - far) / 3  # error of the fourth order
    products = jax.tree.map(lambda leaf, change: float(np.sum(leaf * change)), gradients, direction)
    assert sum(jax.tree.leaves(products)) == pytest.approx(expected, rel=1e-7, abs=1e-7)


@pytest.mark.parametrize("changes", [
    {"norm": "sandwich", "norm_epsilon": 0.3, "embedding_norm": True}, {"norm": "post", "norm_epsilon": 0.3},
    {"rope_base": 20.0}, {"score_scaling": False}, {"pb_relax": 8.0}, {"num_layers": 5},
    {"qk_norm": True, "norm_epsilon": 0.3},
])  # fmt: skip
def test_options_mean_what_the_reference_says(changes: dict[str, Any]) -> None:
    sizes: dict[str, Any] = {"num_layers": 2, "hidden_size": 12, "num_heads": 3, "ffn_size": 10, "vocab_size": 17}
    cfg = GLMConfig(**sizes | changes)
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    params, inputs = jax.tree.map(lambda leaf: 0.4 * leaf, noise(shapes, 0)), sample(cfg)
    with jax.disable_jit():
        logits = apply(cfg, params, *map(jnp.asarray, inputs))
    np.testing.assert_allclose(logits, numpy_reference.forward(cfg, params, *inputs), rtol=0, atol=1e-10)
