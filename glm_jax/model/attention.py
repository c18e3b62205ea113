"""Self-attention under GLM's masks: bidirectional over the context, causal over the targets."""

from __future__ import annotations

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model import attention_core
from glm_jax.model.attention_core import Core
from glm_jax.model.layers import (
    NORMAL_STDDEV,
    ONE_DEVICE,
    PRODUCT,
    Affine,
    LayerNorm,
    TensorAxis,
    at_least_float32,
    xavier_stddev,
)
from glm_jax.model.positions import PositionTerms, rotate
from glm_jax.model.residual import depth_coefficients
from glm_jax.model.visibility import Visibility, dense

Array = jax.Array

MEASURES = "measures"  # flax's collection of what is looked at and changes nothing
LARGESCALE_TENSOR_PARALLEL = 4  # ranks; the quirk below depends on their slices


class LayerCache(NamedTuple):
    """The keys (rotated) and values of one layer for M groups of rows, and where the new ones of one group go.

    A head's keys lie side by side, [T, K], so that a product over them reads memory in order.
    """

    keys: Array  # [M, B, N, T, K]
    values: Array  # [M, B, N, T, K]
    group: Array  # int32 []
    start: Array  # int32 [B], the place of each row's first new token

    def extend(self, keys: Array, values: Array) -> LayerCache:
        """Put the keys and values of the group's new tokens, [B, N, S, K] each, in their places, and nothing else."""

        def put(held: Array, new: Array, start: Array) -> Array:  # [M, N, T, K], [N, S, K], []
            return jax.lax.dynamic_update_slice(held, new[None].astype(held.dtype), (self.group, 0, start, 0))

        put_rows = jax.vmap(put, in_axes=(1, 0, 0), out_axes=1)
        return self._replace(
            keys=put_rows(self.keys, keys, self.start), values=put_rows(self.values, values, self.start)
        )

    def read(self) -> tuple[Array, Array]:
        """Return the group's keys and values, [B, N, T, K] each."""
        keys, values = (jax.lax.dynamic_index_in_dim(a, self.group, keepdims=False) for a in (self.keys, self.values))
        return keys, values


def largest_score(queries: Array, keys: Array, allowed: Array | Visibility) -> Array:
    """Return the largest product of a query and a key that it may see, over sqrt(K): float32 [].

    Args:
        queries: [B, S, N, K].
        keys: [B, N, T, K].
        allowed: of T keys. Of a `Visibility` the padding is left out.
    """
    seen = dense(allowed)  # [B, S, T]
    if isinstance(allowed, Visibility):
        seen &= allowed.segments[:, :, None] > 0

    def of_row(row: tuple[Array, Array, Array]) -> Array:  # the scores of one row are in memory at a time
        queries, keys, seen = row  # [S, N, K], [N, T, K], [S, T]
        scores = jnp.einsum("snk,ntk->nst", at_least_float32(queries), at_least_float32(keys))  # [N, S, T]
        return jnp.where(seen, scores, -jnp.inf).max()

    return jax.lax.map(of_row, (queries, keys, seen)).max() / queries.shape[-1] ** 0.5


def qkv_stddev(cfg: GLMConfig) -> np.ndarray:
    """Return the standard deviation of each column of the qkv kernel, [N, 3, K].

    `largescale` copies a quirk of the reference training code, which scales each rank's packed rows as if they were
    [q; k; v] blocks. So whole heads get the gain beta instead of the v rows.
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


class Attention(nn.Module):
    """Multi-head self-attention: projections around a core, which mixes the values.

    The first projection is fused: q, k and v of each head are side by side, as in GLM-130B.
    """

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE
    core: Core = attention_core.reference

    @nn.compact
    def __call__(
        self,
        x: Array,
        allowed: Array | Visibility,
        terms: PositionTerms,
        layer: Array,
        dropout_keys: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, LayerCache | None]:
        """x [B, S, D], `allowed` of T keys -> [B, S, D] and the cache with the new keys and values.

        Without a cache T = S, and with a `Visibility`: the tokens are whole rows, which a cache only takes in.
        `dropout_keys` [B], one a row.
        """
        cfg, dim, width = self.cfg, self.cfg.head_dim, self.cfg.hidden_size
        members = self.axis.part(cfg.num_heads)  # [N]: the heads of this member
        heads = members.shape[0]
        qkv, bias = Affine(
            (width, heads, 3, dim), ("hidden", "heads", None, None), qkv_stddev(cfg)[:heads], inputs=1, name="qkv"
        )("bsd,dnck->bsnck", self.axis.enter(x))  # [B, S, N, 3, K], [N, 3, K]
        queries, keys, values = jnp.unstack(checkpoint_name(qkv, PRODUCT) + bias, axis=3)  # [B, S, N, K] each
        if cfg.qk_norm:  # arXiv 2302.05442: a scale for each of K, which all heads share, and no bias
            queries, keys = (
                LayerNorm(cfg.norm_epsilon, axis=None, bias=False, name=name)(heads_of)  # [B, S, N, K]
                for name, heads_of in (("query_norm", queries), ("key_norm", keys))
            )
        if terms.rotation is not None:
            queries, keys = rotate(queries, terms.rotation), rotate(keys, terms.rotation)  # [B, S, N, K]
        keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # [B, N, S, K] each
        if self.is_mutable_collection(MEASURES) and not self.is_initializing():
            self.sow(MEASURES, "largest_score", largest_score(queries, keys, allowed))
        if cache is not None:
            cache = cache.extend(keys, values)
            if not isinstance(allowed, Visibility):
                keys, values = cache.read()  # [B, N, T, K] each
        scored = (queries, keys, values, allowed, terms.distance, layer, members, dropout_keys)
        mixed = self.core(cfg, *scored)  # [B, S, N, K]
        partial, bias = Affine(
            (heads, dim, width), ("heads", None, "hidden"), output_stddev(cfg), inputs=2, name="output"
        )("bsnk,nkd->bsd", mixed)  # [B, S, D], [D]
        return checkpoint_name(self.axis.leave(partial), PRODUCT) + bias, cache  # [B, S, D]
