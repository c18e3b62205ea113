"""Attention cores: from queries, keys and values to the mixed values. `reference` supports every option."""

from __future__ import annotations

from typing import Protocol

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import PRODUCT, at_least_float32, dropout
from glm_jax.model.positions import Distance, alibi_slopes
from glm_jax.model.visibility import Visibility, dense

Array = jax.Array


class Core(Protocol):
    """Attention without its projections."""

    def __call__(
        self, cfg: GLMConfig, queries: Array, keys: Array, values: Array, allowed: Array | Visibility,
        distance: Distance | None, layer: Array, heads: Array, dropout_keys: Array | None, /,
    ) -> Array:  # fmt: skip
        """Mix the values that each query may see.

        Args:
            cfg: the model.
            queries: [B, S, N, K], rotated.
            keys, values: [B, N, T, K], the keys rotated.
            allowed: which of the T keys each query may see.
            distance: for ALiBi.
            layer: int32 [], the layer's index in the whole model.
            heads: int32 [N], the indices of these heads.
            dropout_keys: [B], one a row.

        Returns:
            [B, S, N, K].
        """
        ...


def reference(
    cfg: GLMConfig, queries: Array, keys: Array, values: Array, allowed: Array | Visibility, distance: Distance | None,
    layer: Array, heads: Array, dropout_keys: Array | None,
) -> Array:  # fmt: skip
    """Mix values by a dense softmax over all scores, in any dtype and with every option; see `Core`."""
    seen = dense(allowed)  # [B, S, T]
    apart = None if distance is None else distance.dense()  # [B, S, T]
    probabilities = attention_probabilities(cfg, queries, keys, seen, apart, layer, heads)  # [B, N, S, T]
    probabilities = dropout(probabilities.astype(values.dtype), cfg.attention_dropout, dropout_keys, heads)
    mixed = jnp.einsum("bnst,bntk->bnsk", probabilities, values).swapaxes(1, 2)  # [B, S, N, K]
    return checkpoint_name(mixed, PRODUCT)


def attention_probabilities(
    cfg: GLMConfig,
    queries: Array,
    keys: Array,
    allowed: Array,
    distance: Array | None,
    layer: Array,
    heads: Array,
) -> Array:
    """Return softmax probabilities [B, N, S, T] for queries [B, S, N, K], keys [B, N, T, K], allowed [B, S, T].

    `heads`, int32 [N], are the indices of these heads.

    With `score_scaling` the queries are divided by (layer + 1) sqrt(K) before the product in the compute dtype, and the
    scores are multiplied by layer + 1 after it, in float32 (paper section 3.2: float32 softmax), like all that follows,
    or in float16 if that is the `softmax_dtype`. With `pb_relax` alpha the product is divided by alpha, its largest
    magnitude is subtracted, and the result is multiplied by alpha (CogView, arXiv 2105.13290). A query that may see
    nothing attends evenly to everything; one whose scores overflow has NaN.
    """
    if cfg.pb_relax:
        factor: Array | float = cfg.pb_relax
    else:
        factor = (layer + 1).astype(queries.dtype) if cfg.score_scaling else 1.0
    queries = (queries / (factor * cfg.head_dim**0.5)).astype(queries.dtype)  # [B, S, N, K]
    scores = jnp.einsum("bsnk,bntk->bnst", queries, keys)  # [B, N, S, T]
    if cfg.pb_relax:
        scores = scores - jax.lax.stop_gradient(jnp.max(jnp.abs(scores), axis=(-2, -1), keepdims=True))
    half = cfg.softmax_dtype == "float16"
    scores = scores.astype(jnp.float16) if half else at_least_float32(scores)  # [B, N, S, T]
    scores = scores * jnp.asarray(factor, scores.dtype)  # [B, N, S, T]
    if distance is not None:
        slopes = jnp.asarray(alibi_slopes(cfg.num_heads), scores.dtype)[heads]  # [N]
        scores = scores - slopes[:, None, None] * distance[:, None]  # [B, N, S, T]
    hidden: Array | float = float(jnp.finfo(scores.dtype).min)
    if half:  # or a query whose scores all overflow to -inf would see what is hidden; so it gives NaN
        hidden = jnp.where(allowed.any(-1)[:, None, :, None], -jnp.inf, hidden).astype(scores.dtype)  # [B, 1, S, 1]
    scores = jnp.where(allowed[:, None], scores, hidden)  # [B, N, S, T]
    return jax.nn.softmax(scores, axis=-1)  # [B, N, S, T]
