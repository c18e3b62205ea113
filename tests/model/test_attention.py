"""The softmax of attention alone, in float16, where score scaling, pb_relax and the float32 softmax matter."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import GLMConfig, apply, apply_cached, attention_core, init, init_cache, layered
from glm_jax.model.attention_core import attention_probabilities

CFG = GLMConfig(num_layers=3, hidden_size=16, num_heads=4, ffn_size=24, vocab_size=32)  # K = 4
LAYER = 7  # the eighth, whose factor of 8 loses no bits


def draw(scale: float) -> tuple[np.ndarray, np.ndarray]:
    """Return float16 queries [B, S, N, K] and keys [B, T, N, K]."""
    random = np.random.default_rng(0)
    queries, keys = (scale * random.standard_normal((2, length, 4, 4)) for length in (3, 5))
    return queries.astype(np.float16), keys.astype(np.float16)


def softmax(scores: np.ndarray) -> np.ndarray:
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return weights / weights.sum(-1, keepdims=True)


def probabilities(cfg: GLMConfig, queries: np.ndarray, keys: np.ndarray, **changes: Any) -> np.ndarray:
    shown = {"allowed": np.ones((len(queries), queries.shape[1], keys.shape[1]), bool), "distance": None}
    shown |= {"layer": jnp.int32(LAYER), "heads": jnp.arange(queries.shape[2])} | changes
    given = attention_probabilities(cfg, jnp.asarray(queries), jnp.asarray(keys).swapaxes(1, 2), **shown)
    assert given.dtype == cfg.softmax_dtype
    return np.asarray(given)


def probabilities_of(cfg: GLMConfig, queries: jax.Array, keys: jax.Array) -> jax.Array:
    seen = jnp.ones((1, queries.shape[1], keys.shape[1]), bool)
    arguments = (seen, None, jnp.int32(LAYER), jnp.arange(queries.shape[2]))
    return attention_probabilities(cfg, queries, jnp.asarray(keys).swapaxes(1, 2), *arguments)


def scores_of(queries: np.ndarray, keys: np.ndarray) -> np.ndarray:
    return np.einsum("bsnk,btnk->bnst", np.float64(queries), np.float64(keys)) / 2  # sqrt(K)


@pytest.mark.parametrize("changes", [{}, {"score_scaling": False}, {"pb_relax": 16.0}, {"pb_relax": 3.0}])
def test_scaling_cancels_out(changes: dict[str, Any]) -> None:
    queries, keys = draw(1.5)
    expected, tolerance = softmax(scores_of(queries, keys)), 0.03 if "pb_relax" in changes else 3e-3
    for layer in (0, LAYER):
        found = probabilities(dataclasses.replace(CFG, **changes), queries, keys, layer=jnp.int32(layer))
        np.testing.assert_allclose(found, expected, atol=tolerance)
        np.testing.assert_allclose(found.sum(-1), 1, atol=1e-6)  # the softmax itself is float32


def test_score_scaling_keeps_deep_layers_in_range() -> None:
    queries, keys = draw(200.0)
    scores = scores_of(queries, keys)
    assert 65504 < np.abs(scores).max() < 8 * 65504  # float16's largest
    scaled = probabilities(CFG, queries, keys)
    np.testing.assert_array_equal(scaled.argmax(-1), scores.argmax(-1))
    assert not np.isfinite(probabilities(CFG, queries, keys, layer=jnp.int32(0))).all()
    assert not np.isfinite(probabilities(dataclasses.replace(CFG, score_scaling=False), queries, keys)).all()


def test_a_softmax_in_float16_rounds_and_overflows_where_one_in_float32_does_not() -> None:
    """The products are float32 and in range; in float16 those above 1,024 are whole, and times 8 they pass 65,504."""
    half = dataclasses.replace(CFG, softmax_dtype="float16")
    compiled = jax.jit(probabilities_of, static_argnums=0)
    queries = np.array([[[[256.0, 0, 0, 0]] * 4]], np.float32)  # [B, S = 1, N, K]: 16 after the scaling
    keys = np.zeros((1, 2, 4, 4), np.float32)
    keys[0, :, :, 0] = np.array([64.0, 64.0625])[:, None]  # 8,192 and 8,200 as scores of layer 8
    for cfg in (CFG, half):
        np.testing.assert_allclose(compiled(cfg, queries, keys)[0, 0, 0], softmax(np.array([0.0, 8.0])), atol=1e-3)
    keys[0, 1, :, 0] = 64.03125  # 8,196, which float16 has no room for
    np.testing.assert_allclose(compiled(CFG, queries, keys)[0, 0, 0], softmax(np.array([0.0, 4.0])), atol=1e-3)
    assert compiled(half, queries, keys)[0, 0, 0].tolist() == [0.5, 0.5]
    keys[0, :, :, 0] = np.array([640.0, 641.0])[:, None]  # 81,920 and 82,048
    np.testing.assert_allclose(compiled(CFG, queries, keys)[0, 0, 0], [0, 1], atol=1e-6)
    assert not np.isfinite(compiled(half, queries, keys)).any()
    keys[0, 1, :, 0] = 0.0  # hidden; the other score is -81,920, below what float16 has for "hidden"
    for cfg, finite in ((CFG, True), (half, False)):
        seen = np.array([[[True, False]]])
        found = probabilities(cfg, queries, -keys, allowed=seen)
        assert (found[0, 0, 0].tolist() == [1, 0]) == finite == np.isfinite(found).all()
        assert probabilities(cfg, queries, keys * 0, allowed=~seen & seen)[0, 0, 0].tolist() == [0.5, 0.5]


def test_pb_relax_subtracts_the_largest_magnitude_of_a_head_in_float16() -> None:
    """Next to -1000, in another row of the head, 1.0, 1.1 and 1.2 all become -999; the other head does not change."""
    queries = np.array(
        [[[[256, 0, 0, 0]] * 2, [[0, 256, 0, 0]] * 2]], np.float16
    )  # [B = 1, S = 2, N = 2, K]: 1 after 128 x 2
    keys = np.zeros((1, 3, 2, 4), np.float16)
    keys[0, :, 0, 0], keys[0, :, 0, 1] = [1.0, 1.1, 1.2], [-1000, 1.0, 1.0]
    keys[0, :, 1, 0] = [0.5, 0.5 + 1 / 128, 0.5 + 2 / 128]  # 1 apart once multiplied by alpha
    cfg = dataclasses.replace(CFG, pb_relax=128.0)
    found = probabilities(cfg, queries, keys, layer=jnp.int32(0))  # without alpha, 128,000 is out of range
    np.testing.assert_allclose(found[0, 0, 0], [1 / 3] * 3, rtol=1e-6)
    np.testing.assert_allclose(found[0, 0, 1], [0, 0.5, 0.5], atol=1e-6)
    np.testing.assert_allclose(found[0, 1, 0], softmax(np.arange(3.0)), rtol=1e-6)


def test_a_query_that_sees_nothing_attends_evenly_and_others_to_what_they_see() -> None:
    queries, keys = draw(1.0)
    allowed = np.random.default_rng(1).random((2, 3, 5)) < 0.5
    allowed[0, 1], allowed[1, 2] = False, True
    found = probabilities(CFG, queries, keys, allowed=allowed)
    scores = np.where(allowed[:, None], scores_of(queries, keys), -np.inf)
    scores[0, :, 1] = 0
    np.testing.assert_allclose(found, softmax(scores), atol=2e-3)
    assert (found[0, :, 1] == np.float32(0.2)).all()


def test_biases_are_those_of_the_given_heads() -> None:
    """ALiBi over heads 3 and 1 of 4, with slopes 2^-8 and 2^-4."""
    queries, keys = np.zeros((1, 2, 2, 4), np.float32), np.zeros((1, 3, 2, 4), np.float32)
    distance = jnp.asarray([[[0, 16, 32], [16, 0, 48]]])
    cfg = dataclasses.replace(CFG, position="alibi")
    found = probabilities(cfg, queries, keys, distance=distance, heads=jnp.asarray([3, 1]))
    expected = [softmax(-np.asarray(distance[0]) * slope) for slope in (2.0**-8, 2.0**-4)]
    np.testing.assert_allclose(found[0], expected, rtol=1e-6)


@pytest.mark.slow
@pytest.mark.oldest
def test_every_layer_is_told_its_index(monkeypatch: pytest.MonkeyPatch) -> None:
    params, tokens = jax.jit(init, static_argnums=0)(CFG, jax.random.key(0)), jnp.zeros((1, 2), jnp.int32)
    layers = []

    def spy(cfg: Any, *arguments: Any) -> jax.Array:
        layers.append(int(arguments[4]))
        return attention_probabilities(cfg, *arguments)

    monkeypatch.setattr(attention_core, "attention_probabilities", spy)
    row = tokens, jnp.arange(2)[None], jnp.ones((1, 2, 2), bool)
    with jax.disable_jit():
        apply(CFG, params, *row)
        place = jnp.zeros((1, 1), jnp.int32)
        apply_cached(CFG, layered(params), *row, init_cache(CFG, 1, 2), place[0], place)
    assert layers == [0, 1, 2] * 2
