"""Decoding: GLM over the newest tokens of rows, with the keys and values of the earlier ones in a cache.

Each layer has its own arrays, of params and of the cache alike. A scan over stacked arrays would copy every layer out
of them for every token, which takes several times as long as the token's arithmetic.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glm_jax.config.model import GLMConfig
from glm_jax.model import attention_core
from glm_jax.model.attention import LayerCache
from glm_jax.model.attention_core import Core
from glm_jax.model.layers import ONE_DEVICE, TensorAxis
from glm_jax.model.positions import PositionTerms, position_terms
from glm_jax.model.transformer import Params, block, embed, head
from glm_jax.model.visibility import Visibility
from glm_jax.types import Tree

Array = jax.Array
Layer = tuple[Array, Array, Array]  # x, and the keys and values of one layer


class Cache(NamedTuple):
    """Keys (rotated) and values for decoding: an array [M, B, N, T, K] a layer, for M groups of B rows."""

    keys: tuple[Array, ...]
    values: tuple[Array, ...]


def init_cache(cfg: GLMConfig, batch: int, length: int, dtype: DTypeLike = jnp.float32) -> Cache:
    """Return an empty cache for one group of `batch` rows of up to `length` tokens."""
    empty = jnp.zeros((1, batch, cfg.num_heads, length, cfg.head_dim), dtype)
    return Cache((empty,) * cfg.num_layers, (empty,) * cfg.num_layers)


def layered(params: Params) -> Params:
    """Return params whose `blocks` are a tuple of L trees, one a layer, as `apply_cached` takes them."""
    layers = range(jax.tree.leaves(params["blocks"])[0].shape[0])
    return {**params, "blocks": tuple(jax.tree.map(lambda array: array[layer], params["blocks"]) for layer in layers)}  # noqa: B023


def places_of(start: Array, length: int) -> Array:
    """Return the places of `length` new tokens of each row: int32 [B, S], from the first, int32 [B]."""
    return start[:, None] + jnp.arange(length)


def embed_cached(
    cfg: GLMConfig, params: Params, tokens: Array, positions: Array, places: Array, axis: TensorAxis = ONE_DEVICE
) -> Array:
    """Embed the new tokens [B, S] at their places [B, S] of rows with `positions` [B, T] or [B, 2, T] -> [B, S, D]."""
    wanted = places if positions.ndim == 2 else places[:, None]  # [B, S] or [B, 1, S]
    return embed(cfg, params, tokens, jnp.take_along_axis(positions, wanted, axis=-1), axis=axis)  # [B, S, D]


def blocks_cached(
    cfg: GLMConfig,
    layers: tuple[Tree, ...],
    x: Array,
    allowed: Array | Visibility,
    terms: PositionTerms,
    cache: Cache,
    group: Array,
    start: Array,
    first: Array,
    count: Array | None = None,
    axis: TensorAxis = ONE_DEVICE,
    core: Core = attention_core.reference,
) -> tuple[Array, Cache]:
    """Run new tokens of one group of rows through layers.

    Args:
        cfg: the model.
        layers: the params of each, of one stage or of all.
        x: [B, S, D].
        allowed: bool [B, S, T]; or, of whole rows, which begin at place 0, a `Visibility` of their S tokens.
        terms: of the new tokens.
        cache: of these layers.
        group: int32 [], which of the cache's groups the rows are.
        start: int32 [B], the place of each row's first new token.
        first: int32 [], the index in the whole model of the first of `layers`.
        count: int32 [], how many of `layers` to run; None runs all.
        axis: how the members of a mesh join.
        core: of the attention; one that supports `cfg` and `allowed`.

    Returns:
        x [B, S, D], and the cache with the new keys and values.
    """

    @jax.jit  # traced once for all layers
    def run(weights: Tree, index: Array, x: Array, keys: Array, values: Array) -> Layer:
        held = LayerCache(keys, values, group, start)
        x, grown = block(cfg, weights, x, allowed, terms, index, cache=held, axis=axis, core=core)
        assert grown is not None
        return x, grown.keys, grown.values

    keys, values = list(cache.keys), list(cache.values)
    for index, weights in enumerate(layers):
        turn = functools.partial(run, weights, first + index)
        layer = (x, keys[index], values[index])
        if count is None:
            layer = turn(*layer)
        else:  # a loop of one turn or none: a conditional would copy the cache
            layer = jax.lax.fori_loop(0, (index < count).astype(jnp.int32), lambda _, layer: turn(*layer), layer)  # noqa: B023
        x, keys[index], values[index] = layer
    return x, Cache(tuple(keys), tuple(values))


def apply_cached(
    cfg: GLMConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    allowed: Array,
    cache: Cache,
    start: Array,
    at: Array,
) -> tuple[Array, Cache]:
    """Run GLM over new tokens, which may see what the cache holds.

    Args:
        cfg: the model.
        params: from `layered`.
        tokens: int32 [B, S], the new tokens.
        positions: int32 [B, T] (or [B, 2, T]) of the whole rows.
        allowed: bool [B, S, T], which of a row's T places each new token may see.
        cache: of T places; a place that `allowed` shows to no token may hold anything.
        start: int32 [B], the place of each row's first new token.
        at: int32 [B, A], which of the S new tokens give logits. For none, A = 0.

    Returns:
        float32 logits [B, A, V], equal to those of `apply` over whole rows, and the cache with the new keys and values.
    """
    places = places_of(start, tokens.shape[1])  # [B, S]
    x = embed_cached(cfg, params, tokens, positions, places)  # [B, S, D]
    terms = position_terms(cfg, positions, x.dtype, places)
    first = jnp.int32(0)
    x, cache = blocks_cached(cfg, params["blocks"], x, allowed, terms, cache, jnp.int32(0), start, first)
    return head(cfg, params, jnp.take_along_axis(x, at[:, :, None], axis=1)), cache  # [B, A, V]
