"""Dropout: its statistics, and the model with it against numpy_reference.py, which draws its own masks."""

from collections.abc import Iterator
from itertools import combinations
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import numpy_reference
import pytest
from test_numpy_reference import noise, sample

from glm_jax.model import GLMConfig, apply, init
from glm_jax.model.layers import dropout

RATE = 0.3
# Below, a fraction of n independent entries must be within 5 standard errors of its expectation. By chance it fails
# once in 1.7 million draws; the seeds are fixed. A correlation of n entries has standard error n ** -0.5.
ERRORS = 5.0


@pytest.fixture
def double() -> Iterator[None]:
    with jax.enable_x64(True):
        yield


def keys(count: int, seed: int = 0) -> jax.Array:
    return jax.random.split(jax.random.key(seed), count)


@pytest.mark.parametrize("rate", [0.1, RATE, 0.75])
def test_each_entry_is_dropped_at_the_rate_and_the_rest_makes_up_for_it(rate: float) -> None:
    x = 1.0 + np.random.default_rng(0).random((4, 50, 600))
    y = np.asarray(dropout(jnp.asarray(x, jnp.float32), rate, keys(4), jnp.arange(50)))
    kept = y != 0
    np.testing.assert_allclose(y[kept], x[kept] / (1 - rate), rtol=1e-6)
    error = (rate * (1 - rate) / x.size) ** 0.5
    assert kept.mean() == pytest.approx(1 - rate, abs=ERRORS * error)
    # the mean stays: the variance of x kept / (1 - rate) - x is x^2 rate / (1 - rate)
    assert (y - x).mean() == pytest.approx(0, abs=ERRORS * (np.mean(x**2) * rate / (1 - rate) / x.size) ** 0.5)


def correlations(masks: list[np.ndarray]) -> np.ndarray:
    """Return the correlation of every pair of masks, in standard errors."""
    flat = [mask.ravel().astype(float) for mask in masks]
    return np.abs([np.corrcoef(a, b)[0, 1] for a, b in combinations(flat, 2)]) * len(flat[0]) ** 0.5


def test_rows_and_places_draw_for_themselves_and_the_same_wherever_they_are_computed() -> None:
    x, places = jnp.ones((3, 4, 2000)), jnp.arange(4)
    kept = np.asarray(dropout(x, RATE, keys(3), places)) != 0
    assert correlations([kept[row, place] for row in range(3) for place in range(4)]).max() < ERRORS
    part = np.asarray(dropout(x[1:, :2], RATE, keys(3)[1:], places[2:])) != 0
    np.testing.assert_array_equal(part, kept[1:, 2:])
    assert (np.asarray(dropout(x, RATE, keys(3, seed=1), places)) != 0)[0, 0].tolist() != kept[0, 0].tolist()


def test_dropout_keeps_the_dtype_and_does_nothing_without_keys_or_rate() -> None:
    x, places = jnp.ones((1, 2, 3), jnp.bfloat16), jnp.arange(2)
    assert dropout(x, RATE, keys(1), places).dtype == jnp.bfloat16
    assert dropout(x, RATE, None, places) is x and dropout(x, 0.0, keys(1), places) is x


@pytest.mark.slow
@pytest.mark.parametrize("norm, position, activation", [
    ("deepnorm", "rope", "geglu"), ("sandwich", "alibi", "gelu"), ("pre", "learned_2d", "gelu_tanh"),
    ("post", "rope", "gelu"),
])  # fmt: skip
def test_the_model_drops_where_the_reference_does(double: None, norm: Any, position: Any, activation: Any) -> None:
    """The rates differ, so that a swap shows, and neither is 0.5, so that keeping at the rate shows."""
    cfg = GLMConfig(3, 12, 3, 10, 17, 9, norm=norm, position=position, activation=activation,
                    embedding_norm=activation == "gelu", attention_dropout=0.4, hidden_dropout=0.2)  # fmt: skip
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    params, inputs, key = jax.tree.map(lambda leaf: 0.4 * leaf, noise(shapes, 0)), sample(cfg), jax.random.key(5)
    masks = numpy_reference.dropout_masks(cfg, key, 2, 9)
    mixture = np.random.default_rng(2).standard_normal((2, 9, 17))

    def loss(params: Any) -> tuple[jax.Array, jax.Array]:
        logits = apply(cfg, params, *map(jnp.asarray, inputs), key=key)
        return jnp.sum(mixture * jnp.tanh(logits)), logits

    with jax.disable_jit():
        (_, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
    np.testing.assert_allclose(logits, numpy_reference.forward(cfg, params, *inputs, masks), rtol=0, atol=1e-10)

    direction, step = noise(shapes, 3), 1e-5
    ends = [
        jax.tree.map(lambda leaf, change, way=way: leaf + way * step * change, params, direction) for way in (1, -1)
    ]
    values = [np.sum(mixture * np.tanh(numpy_reference.forward(cfg, end, *inputs, masks))) for end in ends]
    slope = sum(jax.tree.leaves(jax.tree.map(lambda leaf, change: np.sum(leaf * change), gradients, direction)))
    assert slope == pytest.approx((values[0] - values[1]) / (2 * step), rel=1e-5)


def test_masks_of_all_places_are_independent() -> None:
    """The masks that the test above finds in the model, across sublayers, layers, rows and heads."""
    cfg = GLMConfig(3, 64, 2, 10, 17, attention_dropout=RATE, hidden_dropout=RATE)
    first, second = numpy_reference.dropout_masks(cfg, jax.random.key(0), 2, 48)
    hidden = [first.embedding, *first.attention, *first.feedforward, second.embedding, *second.attention]
    assert correlations(hidden).max() < ERRORS
    heads = [head for layer in (*first.probabilities, *second.probabilities) for head in layer]  # [S, S] each
    assert correlations(heads).max() < ERRORS
    for mask in (*hidden, *heads):
        assert mask.mean() == pytest.approx(1 - RATE, abs=ERRORS * (RATE * (1 - RATE) / mask.size) ** 0.5)
