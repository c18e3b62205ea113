"""The cross-entropy of the tied head, whose vocabulary is split over devices, from a slice of the tokens at a time.

Logits of all tokens are never in memory together: a slice's losses and gradients follow from its logits at once. Runs
inside a shard_map, like tensor.py.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from glm_jax.parallel.mesh import vary
from glm_jax.parallel.tensor import VOCAB_AXES, first_row
from glm_jax.types import Tree

Array = jax.Array

LOGITS = 2**22  # of a slice; 16 MB, which a processor's cache may hold
SMALLEST = 256  # tokens of a slice, so that reading the embedding for each takes little


def token_losses(logits: Array, targets: Array, num_tokens: int) -> Array:
    """Return the cross-entropy in nats of each target, float32 [...], the same over `pipeline` and `tensor`.

    Args:
        logits: float32 [..., V / shards], for the vocabulary rows that this device holds.
        targets: int32 [...].
        num_tokens: real rows of the vocabulary; the rest are padding and get no probability.
    """
    return _with_gradient(logits, targets, num_tokens, 0.0)[0]


def scores(logits: Array, targets: Array, num_tokens: int) -> tuple[Array, Array]:
    """Return the `token_losses`, and whether no token is likelier than each target: float32 [...], bool [...]."""
    logits, _, largest, chosen = _found(logits, targets, num_tokens)
    total = lax.psum(jnp.exp(logits - largest[..., None]).sum(axis=-1), VOCAB_AXES)  # [...]
    return jnp.log(total) + largest - chosen, chosen >= largest


def losses(x: Array, word: Array, targets: Array, num_tokens: int) -> Array:
    """Return the cross-entropy in nats of each target under the logits x word^T, float32 [B, S].

    Args:
        x: [B, S, D], after the final norm.
        word: [V / shards, D].
        targets: int32 [B, S].
        num_tokens: as in `token_losses`.
    """

    def one(_: tuple[()], slice: tuple[Array, Array]) -> tuple[tuple[()], Array]:
        x, targets = slice
        return (), token_losses(_project(x, word), targets, num_tokens)

    return _by_slices(one, (), (x, targets), word.shape[0])[1]


@partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def weighted(
    x: Array, word: Array, targets: Array, weights: Array, num_tokens: int, z_loss: float = 0.0
) -> tuple[Array, Array]:
    """Return the sum of the `losses` times `weights` [B, S], and the losses, which have no gradient of their own.

    Differentiated, a slice's gradients are computed together with its losses, before its logits are gone. With
    `z_loss` the sum also has z_loss log(Z)^2 times a token's weight, Z the sum of its exponentiated logits (PaLM, arXiv
    2204.02311, section 5). The losses never have it.
    """
    return _forward(x, word, targets, weights, num_tokens, z_loss)[0]


def _forward(
    x: Array, word: Array, targets: Array, weights: Array, num_tokens: int, z_loss: float
) -> tuple[tuple[Array, Array], tuple[Array, Array]]:
    def one(of_word: Array, slice: tuple[Array, Array, Array]) -> tuple[Array, tuple[Array, Array, Array]]:
        x, targets, weights = slice  # [T, D], [T], [T]
        each, penalty, of_logits = _with_gradient(_project(x, word), targets, num_tokens, z_loss)  # [T, V / shards]
        weights = weights[:, None].astype(x.dtype)
        of_logits = lax.optimization_barrier(of_logits.astype(x.dtype))  # or XLA computes it for each of two uses
        of_x = weights * (of_logits @ word)  # [T, D]
        # Transposing x instead of the logits, which are larger, and the sum once, at the end.
        turned = lax.optimization_barrier((weights * x).T)  # [D, T]
        return of_word + jnp.matmul(turned, of_logits, preferred_element_type=of_word.dtype), (each, penalty, of_x)

    wide = jnp.promote_types(x.dtype, jnp.float32)
    start = vary(jnp.zeros(word.shape[::-1], wide))  # [D, V / shards]
    of_word, (each, penalty, of_x) = _by_slices(one, start, (x, targets, weights), word.shape[0])
    return (((each + penalty) * weights).sum(), each), (of_x, of_word)


def _backward(
    num_tokens: int, z_loss: float, gradients: tuple[Array, Array], cotangents: tuple[Array, Array]
) -> tuple[Array, Array, None, None]:
    of_x, of_word = gradients  # [B, S, D], float32 [D, V / shards]
    scale = cotangents[0]  # float32 []
    # Scaled before the cast: the sum over many tokens may not fit in float16.
    return (scale * of_x).astype(of_x.dtype), (scale * of_word.T).astype(of_x.dtype), None, None


weighted.defvjp(_forward, _backward)


def _project(x: Array, word: Array) -> Array:
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("td,vd->tv", x, word, preferred_element_type=wide)  # [T, V / shards]


def _found(logits: Array, targets: Array, num_tokens: int) -> tuple[Array, Array, Array, Array]:
    """Return the logits without padding, where the targets are, the largest logits and those of the targets.

    Returns:
        float32 [..., V / shards], bool [..., V / shards], float32 [...], float32 [...].
    """
    rows = first_row(logits.shape[-1]) + jnp.arange(logits.shape[-1])  # [V / shards]
    if num_tokens < logits.shape[-1] * math.prod(lax.axis_size(axis) for axis in VOCAB_AXES):
        logits = jnp.where(rows < num_tokens, logits, jnp.finfo(logits.dtype).min)  # [..., V / shards]
    largest = lax.pmax(logits.max(axis=-1), VOCAB_AXES)  # [...]
    hit = targets[..., None] == rows  # [..., V / shards]
    chosen = lax.psum(jnp.where(hit, logits, 0).sum(axis=-1), VOCAB_AXES)  # [...]
    return logits, hit, largest, chosen


def _with_gradient(logits: Array, targets: Array, num_tokens: int, z_loss: float) -> tuple[Array, Array, Array]:
    """Return `token_losses`, what z_loss adds to each, and the gradient of both for the logits [..., V / shards]."""
    logits, hit, largest, chosen = _found(logits, targets, num_tokens)
    exponentials = jnp.exp(logits - largest[..., None])  # [..., V / shards]
    total = lax.psum(exponentials.sum(axis=-1), VOCAB_AXES)  # [...]
    probabilities = exponentials / total[..., None]  # [..., V / shards]
    loss, gradient = jnp.log(total) + largest - chosen, probabilities - hit
    if not z_loss:
        return loss, jnp.zeros_like(loss), gradient
    log_sum = jnp.log(total) + largest  # [...], the logarithm of Z
    return loss, z_loss * log_sum**2, gradient + 2 * z_loss * log_sum[..., None] * probabilities


def _by_slices(
    one: Callable[[Tree, Tree], tuple[Tree, Tree]], start: Tree, arrays: tuple[Array, ...], vocabulary: int
) -> tuple[Tree, Tree]:
    """Scan `one` over slices of the tokens of arrays [B, S, ...]; return the last carry, and outputs [B, S, ...]."""
    batch = arrays[0].shape[:2]
    tokens = math.prod(batch)
    count = math.ceil(tokens / max(SMALLEST, LOGITS // vocabulary))
    size = math.ceil(tokens / count)

    def cut(array: Array) -> Array:
        flat = array.reshape(tokens, *array.shape[2:])
        padding = [(0, count * size - tokens)] + [(0, 0)] * (flat.ndim - 1)  # tokens of weight 0
        return jnp.pad(flat, padding).reshape(count, size, *flat.shape[1:])

    def join(array: Array) -> Array:
        flat = array.reshape(count * size, *array.shape[2:])
        return flat[:tokens].reshape(*batch, *flat.shape[1:])

    carry, outputs = lax.scan(one, start, tuple(map(cut, arrays)))
    return carry, jax.tree.map(join, outputs)
