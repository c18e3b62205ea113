"""Positions: rotary (RoPE), linear biases (ALiBi), and the original GLM's two learned streams."""

from __future__ import annotations

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from glm_jax.config.model import GLMConfig

Array = jax.Array


class Distance(NamedTuple):
    """What ALiBi's distances follow from: position, run and place inside the run of each token (see `repeat_ranks`)."""

    queries: Array  # int32 [B, 3, S]
    keys: Array  # int32 [B, 3, T]

    def dense(self) -> Array:
        """Return the distance from each query to each key [B, S, T]."""
        return distance(self.queries[:, :, :, None], self.keys[:, :, None])


def distance(queries: Array, keys: Array) -> Array:
    """Return |p_i - p_j|, plus the distance inside a run of equal positions.

    A target block is such a run: all its positions equal that of the blank, and do not show the order.

    Args:
        queries, keys: as in `Distance`, with the shapes of the two broadcasting against each other after the axis of 3.
    """
    apart = jnp.abs(queries - keys)  # [B, 3, ...]
    return apart[:, 0] + jnp.where(apart[:, 1] == 0, apart[:, 2], 0)


class PositionTerms(NamedTuple):
    """What attention needs to know of the positions; fields that the config does not use are None."""

    rotation: tuple[Array, Array] | None = None  # cosines and sines for the queries and new keys, [B, S, 1, K/2]
    distance: Distance | None = None  # ALiBi's, from each query to each of T keys


def rotary_tables(cfg: GLMConfig, positions: Array, dtype: jnp.dtype) -> tuple[Array, Array]:
    """Return cosines and sines [B, S, 1, K/2] for `positions` [B, S] (paper section 2.1; RoFormer, arXiv 2104.09864).

    Angles are float32 or wider, unless `rope_angles` asks for the float16 tables of the released inference code, where
    frequencies, positions, angles and tables are all rounded to float16.
    """
    half = cfg.head_dim // 2
    wide = jnp.promote_types(dtype, jnp.float32)
    table_dtype = jnp.float16 if cfg.rope_angles == "float16" else wide
    exponents = jnp.arange(half, dtype=wide) / half  # [K/2]
    frequencies = (cfg.rope_base**-exponents).astype(table_dtype)  # [K/2]
    angles = positions[:, :, None, None].astype(table_dtype) * frequencies  # [B, S, 1, K/2]
    return jnp.cos(angles), jnp.sin(angles)


def rotate(x: Array, rotation: tuple[Array, Array]) -> Array:
    """Rotate x [B, S, N, K]: the pairs are (j, j + K/2), not neighbours, as in GLM-130B's code."""
    cosine, sine = rotation  # [B, S, 1, K/2]
    first, second = jnp.split(x.astype(jnp.promote_types(x.dtype, cosine.dtype)), 2, axis=-1)  # [B, S, N, K/2]
    rotated = jnp.concatenate([first * cosine - second * sine, second * cosine + first * sine], axis=-1)
    return rotated.astype(x.dtype)  # [B, S, N, K]


def alibi_slopes(num_heads: int) -> list[float]:
    """Return one slope a head: 2^(-8/n), 2^(-16/n), ... for n heads, n a power of two (arXiv 2108.12409).

    For other counts: the slopes of the next lower power of two, then every other slope of the next higher one, as in
    the authors' code.

    >>> alibi_slopes(4)
    [0.25, 0.0625, 0.015625, 0.00390625]
    >>> alibi_slopes(3)
    [0.0625, 0.00390625, 0.25]
    """
    power = 2 ** math.floor(math.log2(num_heads))
    slopes = [2 ** (-8 * (head + 1) / power) for head in range(power)]
    if power < num_heads:
        slopes += alibi_slopes(2 * power)[0::2][: num_heads - power]
    return slopes


def repeat_ranks(positions: Array) -> tuple[Array, Array]:
    """Find runs of equal positions [B, S]; return each token's run and its place inside the run, both [B, S]."""
    starts = jnp.concatenate([jnp.ones_like(positions[:, :1], bool), positions[:, 1:] != positions[:, :-1]], axis=1)
    runs = jnp.cumsum(starts, axis=1)  # [B, S]
    index = jnp.arange(positions.shape[1])
    ranks = index - jax.lax.cummax(jnp.where(starts, index, 0), axis=1)  # [B, S]
    return runs, ranks


def alibi_distance(positions: Array, places: Array | None = None) -> Distance:
    """Return what ALiBi's distances between queries and keys follow from.

    Args:
        positions: int32 [B, T], of the keys.
        places: int32 [B, S], which of the T tokens the queries are; None for all of them.
    """
    keys = jnp.stack([positions, *repeat_ranks(positions)], axis=1)  # [B, 3, T]
    return Distance(keys if places is None else jnp.take_along_axis(keys, places[:, None], axis=2), keys)


def position_terms(cfg: GLMConfig, positions: Array, dtype: jnp.dtype, places: Array | None = None) -> PositionTerms:
    """Compute once, for all layers, what attention needs of the positions.

    Args:
        cfg: the model.
        positions: int32 [B, T] of whole rows, or [B, 2, T] for learned_2d.
        dtype: of the computation.
        places: int32 [B, S], which of the T tokens are computed, with the others in a cache; None for all of them.
    """
    if cfg.position == "rope":
        here = positions if places is None else jnp.take_along_axis(positions, places, axis=1)  # [B, S]
        return PositionTerms(rotation=rotary_tables(cfg, here, dtype))
    if cfg.position == "alibi":
        return PositionTerms(distance=alibi_distance(positions, places))
    return PositionTerms()
