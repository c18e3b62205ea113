"""Losses and gradients by slices of tokens, against float64 numpy; on larger meshes test_pipeline.py compares them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.parallel import cross_entropy, mesh

ROWS, LENGTH, HIDDEN, VOCABULARY, REAL = 3, 11, 6, 16, 13  # the last 3 entries are padding
FACTOR = 3.0  # of the sum's gradient, as a loss scale


def reference(
    x: np.ndarray, word: np.ndarray, targets: np.ndarray, weights: np.ndarray, z_loss: float
) -> tuple[np.ndarray, ...]:
    """Return losses, log(Z)^2, and the gradients of the weighted sum times FACTOR for x and word."""
    logits = x @ word[:REAL].T  # [B, S, V real]
    shifted = logits - logits.max(-1, keepdims=True)
    sums = np.log(np.exp(shifted).sum(-1)) + logits.max(-1)  # [B, S], log(Z)
    probabilities = np.exp(shifted) / np.exp(shifted).sum(-1, keepdims=True)
    hit = np.eye(REAL)[targets]  # [B, S, V real]
    of_logits = FACTOR * weights[..., None] * (probabilities * (1 + 2 * z_loss * sums[..., None]) - hit)
    padding = np.zeros((VOCABULARY - REAL, HIDDEN))
    of_word = np.concatenate([np.einsum("bsv,bsd->vd", of_logits, x), padding])
    return -np.log((probabilities * hit).sum(-1)), sums**2, of_logits @ word[:REAL], of_word


@pytest.mark.parametrize("z_loss", [0.0, 0.05])
@pytest.mark.parametrize("tokens", [4, 11, 64])  # of a slice: 33 tokens make 9 slices with padding, 3, or 1
@pytest.mark.parametrize("dtype, rtol", [("float32", 2e-6), ("bfloat16", 2e-2), ("float16", 2e-3)])
def test_slices_give_losses_and_gradients_of_numpy(
    z_loss: float, tokens: int, dtype: str, rtol: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cross_entropy, "SMALLEST", tokens)
    monkeypatch.setattr(cross_entropy, "LOGITS", 1)
    random = np.random.default_rng(0)
    x, word = random.normal(size=(ROWS, LENGTH, HIDDEN)), random.normal(size=(VOCABULARY, HIDDEN))
    word[REAL:] = 100  # padding that would win, were it counted
    targets, weights = random.integers(0, REAL, (ROWS, LENGTH)), random.random((ROWS, LENGTH))
    weights[0, :5] = 0
    halves = [jnp.asarray(array, dtype) for array in (x, word)]

    def run(x: jax.Array, word: jax.Array, targets: jax.Array, weights: jax.Array) -> Any:
        x, word = mesh.vary((x, word))

        def total(x: jax.Array, word: jax.Array) -> tuple[jax.Array, jax.Array]:
            loss, losses = cross_entropy.weighted(x, word, targets, weights, REAL, z_loss)
            return FACTOR * loss, losses

        (loss, losses), gradients = jax.value_and_grad(total, (0, 1), has_aux=True)(x, word)
        return mesh.vary((loss[None], losses, *gradients, cross_entropy.losses(x, word, targets, REAL)))

    made = mesh.build(dict.fromkeys(mesh.AXES, 1))
    mapped = jax.jit(jax.shard_map(run, mesh=made, in_specs=jax.P(), out_specs=jax.P(mesh.AXES)))
    loss, losses, of_x, of_word, alone = mapped(halves[0], halves[1], targets, weights.astype(np.float32))
    x, word = (np.asarray(half, np.float64) for half in halves)
    expected, squares, *gradients = reference(x, word, targets, weights, z_loss)
    assert losses.dtype == jnp.float32 and of_x.dtype == of_word.dtype == dtype
    for got, want in zip((losses, of_x, of_word), (expected, *gradients), strict=True):
        np.testing.assert_allclose(np.asarray(got, np.float64), want, rtol=rtol, atol=rtol * np.abs(want).max())
    np.testing.assert_array_equal(losses, alone)
    np.testing.assert_allclose(loss[0], FACTOR * ((expected + z_loss * squares) * weights).sum(), rtol=rtol)


def test_many_tokens_do_not_overflow_before_the_loss_is_scaled() -> None:
    """In float16 the sum over 4,096 tokens of one target passes 65,504; times a small scale it is in range."""
    x, word = jnp.full((1, 4096, 1), 64, jnp.float16), jnp.zeros((2, 1), jnp.float16)
    targets, weights = jnp.zeros((1, 4096), jnp.int32), jnp.ones((1, 4096))

    def run(x: jax.Array, word: jax.Array) -> jax.Array:
        x, word = mesh.vary((x, word))
        return jax.grad(lambda word: 2.0**-10 * cross_entropy.weighted(x, word, targets, weights, 2)[0])(word)

    made = mesh.build(dict.fromkeys(mesh.AXES, 1))
    gradient = jax.jit(jax.shard_map(run, mesh=made, in_specs=jax.P(), out_specs=jax.P(mesh.AXES)))(x, word)
    np.testing.assert_allclose(gradient[:, 0], [-128, 128])  # 4,096 x 64 x (1/2 - 1) / 1,024, and the other's
