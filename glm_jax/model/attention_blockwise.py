"""Attention block by block: no [B, N, S, S] in memory, and no work for keys that no query of a block may see.

The softmax is taken online over blocks of keys (arXiv 1805.02867), and the backward pass computes the scores again
from the logarithm of their sum (FlashAttention, arXiv 2205.14135). Its scores lie transposed, keys before queries, so
that all but the smallest of its products read both operands in the order of memory, which XLA's CPU backend needs.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import PRODUCT, at_least_float32
from glm_jax.model.positions import Distance, alibi_slopes, distance
from glm_jax.model.visibility import Visibility, spans

Array = jax.Array

BLOCK = 128  # queries, and keys, of a block
SMALLEST = 32  # below it a block costs more than it saves
HEADS = 8  # rows are taken together until a block has so many heads, so that its products use several cores


class _Tokens(NamedTuple):
    """What masks and biases need of some tokens; arrays [G, S] of a group of G rows."""

    segments: Array
    context: Array
    distance: Array | None  # [G, 3, S], for ALiBi


class _Scale(NamedTuple):
    """How products become scores."""

    factor: Array  # float32 []
    slopes: Array | None  # float32 [N], ALiBi's


class _Drops(NamedTuple):
    """Dropout of probabilities."""

    keys: Array  # [G, N], one for each row and head
    kept: Array  # [], the share of probabilities that are kept


class _Kept(NamedTuple):
    """What the backward pass needs; arrays [G, N, S, K] unless noted."""

    queries: Array
    keys: Array
    values: Array
    mixed: Array
    logs: Array  # float32 [G, N, S], the logarithm of the sum of a query's exponentiated scores
    tokens: _Tokens
    scale: _Scale
    drops: _Drops | None


def block_size(length: int) -> int | None:
    """Return the tokens of a block for rows of `length`, or None if they do not divide into blocks of a useful size."""
    size = math.gcd(length, BLOCK)
    return size if size >= SMALLEST and size < length else None


def blockwise(
    cfg: GLMConfig, queries: Array, keys: Array, values: Array, allowed: Array | Visibility,
    apart: Distance | None, layer: Array, heads: Array, dropout_keys: Array | None,
) -> Array:  # fmt: skip
    """Mix values block by block; see `attention_core.Core`. `attention_cores.choose` says when this is possible.

    Dropout draws a mask for each block, from the row's key and the indices of head and block. It is the same whatever
    rows and heads a device holds, but its bits are others than those of `reference`.
    """
    assert isinstance(allowed, Visibility)
    rows, length, count, dim = queries.shape
    wide = jnp.promote_types(queries.dtype, jnp.float32)
    factor = jnp.asarray(cfg.pb_relax or ((layer + 1) if cfg.score_scaling else 1), wide)  # see attention_core
    queries = (queries / (factor * dim**0.5).astype(queries.dtype)).astype(queries.dtype)  # [B, S, N, K]
    tokens = _Tokens(allowed.segments, allowed.context, None if apart is None else apart.keys)
    slopes = None if apart is None else jnp.asarray(alibi_slopes(cfg.num_heads), wide)[heads]
    drop_keys = _head_keys(dropout_keys, heads) if cfg.attention_dropout else None
    together = math.gcd(rows, max(1, HEADS // count))  # G

    def grouped(array: Array) -> Array:  # [B, ...] -> [B / G, G, ...]
        return array.reshape(-1, together, *array.shape[1:])

    def group(arrays: tuple[Array, Array, Array, _Tokens, Array | None]) -> Array:
        *rest, drop_keys = arrays
        drops = None if drop_keys is None else _Drops(drop_keys, jnp.asarray(1 - cfg.attention_dropout, wide))
        return _attend(*rest, _Scale(factor, slopes), drops)  # [G, N, S, K]

    arrays = (queries.swapaxes(1, 2), keys, values, tokens, drop_keys)
    mixed = lax.map(group, jax.tree.map(grouped, arrays))  # [B / G, G, N, S, K]
    return mixed.reshape(rows, count, length, dim).swapaxes(1, 2)  # [B, S, N, K]


def _head_keys(keys: Array | None, heads: Array) -> Array | None:
    """Return a key for each row and head, [B, N], from those of the rows, [B]."""
    return None if keys is None else jax.vmap(jax.vmap(jax.random.fold_in, (None, 0)), (0, None))(keys, heads)


@jax.custom_vjp
def _attend(queries: Array, keys: Array, values: Array, tokens: _Tokens, scale: _Scale, drops: _Drops | None) -> Array:
    """Mix values [G, N, S, K] for scaled queries [G, N, S, K]."""
    return _forward(queries, keys, values, tokens, scale, drops)[0]


def _forward(
    queries: Array, keys: Array, values: Array, tokens: _Tokens, scale: _Scale, drops: _Drops | None
) -> tuple[Array, _Kept]:
    size = block_size(queries.shape[2]) or queries.shape[2]
    firsts, stops = visible_blocks(tokens, size)

    def block(i: Array) -> tuple[Array, Array]:
        query, of_queries = _slice(queries, i, size), _tokens(tokens, i, size)  # [G, N, Q, K]

        def scores(j: Array) -> Array:  # [G, N, Q, T]
            products = _dot("gnqk,gntk->gnqt", query, _slice(keys, j, size))
            return _scores(products, of_queries, _tokens(tokens, j, size), (i - j) * size, scale)

        def mix(probabilities: Array, j: Array) -> Array:  # [G, N, Q, K]
            probabilities = _drop(probabilities.swapaxes(2, 3), drops, i, j).swapaxes(2, 3)
            return _dot("gnqt,gntk->gnqk", probabilities.astype(values.dtype), _slice(values, j, size))

        def more(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            largest, total, mixed = carry
            new = scores(j)
            larger = jnp.maximum(largest, new.max(-1, keepdims=True))  # [G, N, Q, 1]
            probabilities, shrink = jnp.exp(new - larger), jnp.exp(largest - larger)
            total = total * shrink + probabilities.sum(-1, keepdims=True)
            return larger, total, mixed * shrink + mix(probabilities, j)

        first = scores(firsts[i])
        largest = first.max(-1, keepdims=True)
        probabilities = jnp.exp(first - largest)
        start = (largest, probabilities.sum(-1, keepdims=True), mix(probabilities, firsts[i]))
        largest, total, mixed = lax.fori_loop(firsts[i] + 1, stops[i], more, start)
        return (mixed / total).astype(queries.dtype), (largest + jnp.log(total))[..., 0]

    mixed, logs = lax.map(block, jnp.arange(queries.shape[2] // size))  # [S / Q, G, N, Q, K], [S / Q, G, N, Q]
    mixed, logs = jnp.moveaxis(mixed, 0, 2).reshape(queries.shape), jnp.moveaxis(logs, 0, 2).reshape(queries.shape[:3])
    mixed, logs = checkpoint_name(mixed, PRODUCT), checkpoint_name(logs, PRODUCT)
    return mixed, _Kept(queries, keys, values, mixed, logs, tokens, scale, drops)


def _backward(kept: _Kept, gradient: Array) -> tuple[Array | None, ...]:
    queries, keys, values, mixed, logs, tokens, scale, drops = kept
    size = block_size(queries.shape[2]) or queries.shape[2]
    firsts, stops = visible_blocks(tokens, size)
    shift = jnp.sum(at_least_float32(gradient) * mixed, -1)  # [G, N, S]
    turned = keys.swapaxes(2, 3)  # [G, N, K, T]

    def block(carry: tuple[Array, Array], i: Array) -> tuple[tuple[Array, Array], Array]:
        query, of_mixed = _slice(queries, i, size), _slice(gradient, i, size)  # [G, N, Q, K]
        log, shifted = _slice(logs, i, size)[:, :, None], _slice(shift, i, size)[:, :, None]  # [G, N, 1, Q]
        of_queries = _tokens(tokens, i, size)

        def more(j: Array, carry: tuple[Array, Array, Array]) -> tuple[Array, Array, Array]:
            of_query, of_keys, of_values = carry
            products = _dot("gntk,gnqk->gntq", _slice(keys, j, size), query)  # [G, N, T, Q]
            scores = _scores(products, of_queries, _tokens(tokens, j, size), (i - j) * size, scale, turned=True)
            probabilities = jnp.exp(scores - log)
            of_probabilities = _dot("gntk,gnqk->gntq", _slice(values, j, size), of_mixed)
            of_products = probabilities * (_drop(of_probabilities, drops, i, j) - shifted) * scale.factor
            probabilities = _drop(probabilities, drops, i, j)
            of_products = of_products.astype(queries.dtype)
            of_values = _add(of_values, _dot("gntq,gnqk->gntk", probabilities.astype(values.dtype), of_mixed), j, size)
            of_keys = _add(of_keys, _dot("gntq,gnqk->gntk", of_products, query), j, size)
            key = lax.dynamic_slice_in_dim(turned, j * size, size, 3)  # [G, N, K, T]
            return of_query + _dot("gnkt,gntq->gnkq", key, of_products), of_keys, of_values

        start = jnp.zeros_like(query, shift.dtype).swapaxes(2, 3)  # [G, N, K, Q]
        of_query, *sums = lax.fori_loop(firsts[i], stops[i], more, (start, *carry))
        return (sums[0], sums[1]), of_query.swapaxes(2, 3).astype(queries.dtype)

    start = (jnp.zeros_like(keys, shift.dtype), jnp.zeros_like(values, shift.dtype))
    (of_keys, of_values), of_queries = lax.scan(block, start, jnp.arange(queries.shape[2] // size))
    of_queries = jnp.moveaxis(of_queries, 0, 2).reshape(queries.shape)
    return of_queries, of_keys.astype(keys.dtype), of_values.astype(values.dtype), None, None, None


_attend.defvjp(_forward, _backward)


def visible_blocks(tokens: _Tokens, size: int) -> tuple[Array, Array]:
    """Return the first block of keys that each block of queries needs, and the one after the last: int32 [S / size]."""
    return spans(Visibility(tokens.segments, tokens.context).blocks(size).any(0))


def _dot(equation: str, left: Array, right: Array) -> Array:
    """Multiply, with sums in float32 or wider."""
    return jnp.einsum(equation, left, right, preferred_element_type=jnp.promote_types(left.dtype, jnp.float32))


def _drop(x: Array, drops: _Drops | None, i: Array, j: Array) -> Array:
    """Zero what is dropped of x [G, N, T, Q], of block i of queries and block j of keys, and scale the rest."""
    if drops is None:
        return x

    def keep(key: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, i), j), drops.kept, x.shape[2:])

    return jnp.where(jax.vmap(jax.vmap(keep))(drops.keys), x / drops.kept, 0)


def _slice(array: Array, block: Array, size: int) -> Array:
    """Return one block of an array [G, N, S, ...]."""
    return lax.dynamic_slice_in_dim(array, block * size, size, 2)


def _add(sums: Array, term: Array, block: Array, size: int) -> Array:
    """Add a term to one block of sums [G, N, S, K]."""
    return lax.dynamic_update_slice_in_dim(sums, _slice(sums, block, size) + term, block * size, 2)


def _tokens(tokens: _Tokens, block: Array, size: int) -> _Tokens:
    """Return the tokens of one block."""
    cut = functools.partial(lax.dynamic_slice_in_dim, start_index=block * size, slice_size=size, axis=-1)
    return jax.tree.map(cut, tokens)


def _scores(
    products: Array, queries: _Tokens, keys: _Tokens, ahead: Array, scale: _Scale, turned: bool = False
) -> Array:
    """Turn products [G, N, Q, T] into scores, with the lowest number where a query may not see a key.

    The first query stands `ahead` places after the first key. If `turned`, products and scores are [G, N, T, Q].
    """
    query_axis, key_axis = (-2, -1) if turned else (-1, -2)  # to be added to a query's [G, Q] and to a key's [G, T]

    def pair(of_queries: Array, of_keys: Array) -> tuple[Array, Array]:
        return jnp.expand_dims(of_queries, query_axis), jnp.expand_dims(of_keys, key_axis)

    query_segment, key_segment = pair(queries.segments, keys.segments)
    places = jnp.arange(keys.segments.shape[1])[None]  # [1, T]
    query_place, key_place = pair(ahead + places, places)
    _, key_context = pair(queries.context, keys.context)
    allowed = (query_segment == key_segment) & ((query_place >= key_place) | key_context)  # [G, Q, T]
    scores = products * scale.factor
    if scale.slopes is not None:
        assert queries.distance is not None and keys.distance is not None
        apart = distance(*pair(queries.distance, keys.distance))  # [G, Q, T]
        scores = scores - scale.slopes[:, None, None] * apart[:, None]
    return jnp.where(allowed[:, None], scores, jnp.finfo(scores.dtype).min)
