"""Self-attention under GLM's masks: bidirectional over the context, causal over the targets."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import (
    NORMAL_STDDEV,
    ONE_DEVICE,
    Affine,
    TensorAxis,
    at_least_float32,
    dropout,
    xavier_stddev,
)
from glm_jax.model.positions import PositionTerms, alibi_slopes, rotate
from glm_jax.model.residual import depth_coefficients

Array = jax.Array

LARGESCALE_TENSOR_PARALLEL = 4  # the ranks whose slices the quirk below depends on


class LayerCache(NamedTuple):
    """The keys (rotated) and values of one layer, [B, T, N, K] each, and where the next ones go."""

    keys: Array
    values: Array
    start: Array  # int32 []


def visibility(segments: Array, context: Array) -> Array:
    """Return which key each query may see: `allowed` [B, S, S] from segments [B, S] and context [B, S].

    Packed samples (segments 1, 2, ...; 0 is padding) never see one another. Inside a segment the context sees all of
    the context, and a target token sees the context and what precedes it (paper,
    section 2.2). Padding tokens see one another, so that no row of the softmax is empty.
    """
    length = segments.shape[1]
    causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]  # [S, S]
    same = segments[:, :, None] == segments[:, None, :]  # [B, S, S]
    return same & (causal | context[:, None, :])  # [B, S, S]


def qkv_stddev(cfg: GLMConfig) -> np.ndarray:
    """Return the standard deviation of each column of the qkv kernel, [N, 3, K].

    `largescale` copies a quirk of the reference training code: it scales each rank's packed rows as if they were
    [q; k; v] blocks, so that whole heads, not the v rows, get the gain beta.
    """
    heads, width, dim = cfg.num_heads, cfg.hidden_size, cfg.head_dim
    if cfg.initialisation == "normal":
        return np.full((heads, 3, dim), NORMAL_STDDEV)
    gain = depth_coefficients(cfg.norm, cfg.num_layers).value_gain
    gains = np.ones((heads, 3, dim))
    if cfg.initialisation == "largescale":
        rows = gains.reshape(LARGESCALE_TENSOR_PARALLEL, -1)
        rows[:, rows.shape[1] * 2 // 3 :] = gain
    else:
        gains[:, 2] = gain
    return gains * xavier_stddev(width, width)


def output_stddev(cfg: GLMConfig) -> float:
    """Return the standard deviation of the attention output kernel."""
    if cfg.initialisation == "normal":
        return NORMAL_STDDEV * (2 * cfg.num_layers) ** -0.5
    gain = depth_coefficients(cfg.norm, cfg.num_layers).output_gain
    return xavier_stddev(cfg.hidden_size, cfg.hidden_size, gain)


def attention_probabilities(
    cfg: GLMConfig,
    queries: Array,
    keys: Array,
    allowed: Array,
    distance: Array | None,
    layer: Array,
    heads: Array,
) -> Array:
    """Return float32 softmax weights [B, N, S, T] for queries [B, S, N, K], keys [B, T, N, K], allowed [B, S, T].

    `heads`, int32 [N], says which heads they are.
    With `score_scaling` the queries are divided by (layer + 1) sqrt(K) before the product in compute dtype, and the
    float32 scores multiplied by layer + 1 after it (paper section 3.2: float32 softmax). With `pb_relax` alpha the
    product is divided by alpha, less its largest magnitude, and multiplied by alpha (CogView, arXiv 2105.13290).
    A query that may see nothing attends evenly to everything.
    """
    if cfg.pb_relax:
        factor: Array | float = cfg.pb_relax
    else:
        factor = (layer + 1).astype(queries.dtype) if cfg.score_scaling else 1.0
    queries = (queries / (factor * cfg.head_dim**0.5)).astype(queries.dtype)  # [B, S, N, K]
    scores = jnp.einsum("bsnk,btnk->bnst", queries, keys)  # [B, N, S, T]
    if cfg.pb_relax:
        scores = scores - jax.lax.stop_gradient(jnp.max(jnp.abs(scores), axis=(-2, -1), keepdims=True))
    scores = at_least_float32(scores) * factor  # [B, N, S, T]
    if distance is not None:
        slopes = jnp.asarray(alibi_slopes(cfg.num_heads), scores.dtype)[heads]  # [N]
        scores = scores - slopes[:, None, None] * distance[:, None]  # [B, N, S, T]
    scores = jnp.where(allowed[:, None], scores, jnp.finfo(scores.dtype).min)  # [B, N, S, T]
    return jax.nn.softmax(scores, axis=-1)  # [B, N, S, T]


class Attention(nn.Module):
    """Multi-head self-attention with a fused projection: for each head q, k and v side by side, as in GLM-130B."""

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE

    @nn.compact
    def __call__(
        self,
        x: Array,
        allowed: Array,
        terms: PositionTerms,
        layer: Array,
        dropout_keys: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, LayerCache | None]:
        """x [B, S, D], allowed [B, S, T] -> [B, S, D] and the cache with the new keys and values (T = S without).

        `dropout_keys` [B], one a row.
        """
        cfg, dim, width = self.cfg, self.cfg.head_dim, self.cfg.hidden_size
        members = self.axis.part(cfg.num_heads)  # [N]: the heads that are here
        heads = members.shape[0]
        kernel, bias = Affine(
            (width, heads, 3, dim), ("hidden", "heads", None, None), qkv_stddev(cfg)[:heads], inputs=1, name="qkv"
        )()  # [D, N, 3, K], [N, 3, K]
        qkv = jnp.einsum("bsd,dnck->cbsnk", self.axis.enter(x), kernel) + bias.transpose(1, 0, 2)[:, None, None]
        queries, keys, values = qkv  # [B, S, N, K] each
        if terms.rotation is not None:
            queries, keys = rotate(queries, terms.rotation), rotate(keys, terms.rotation)  # [B, S, N, K]
        if cache is not None:
            keys = jax.lax.dynamic_update_slice_in_dim(cache.keys, keys, cache.start, axis=1)  # [B, T, N, K]
            values = jax.lax.dynamic_update_slice_in_dim(cache.values, values, cache.start, axis=1)  # [B, T, N, K]
            cache = LayerCache(keys, values, cache.start)
        weights = attention_probabilities(cfg, queries, keys, allowed, terms.distance, layer, members)  # [B, N, S, T]
        weights = dropout(weights.astype(values.dtype), cfg.attention_dropout, dropout_keys, members)  # [B, N, S, T]
        mixed = jnp.einsum("bnst,btnk->bsnk", weights, values)  # [B, S, N, K]
        kernel, bias = Affine(
            (heads, dim, width), ("heads", None, "hidden"), output_stddev(cfg), inputs=2, name="output"
        )()  # [N, K, D], [D]
        return self.axis.leave(jnp.einsum("bsnk,nkd->bsd", mixed, kernel)) + bias, cache  # [B, S, D]
