"""Attention by cuDNN's fused kernels, for NVIDIA's GPUs."""

from __future__ import annotations

from typing import Literal

import jax
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import PRODUCT
from glm_jax.model.positions import Distance
from glm_jax.model.visibility import Visibility, dense

Array = jax.Array

IMPLEMENTATION: Literal["cudnn", "xla"] = "cudnn"  # `xla` makes the same call with products that any platform has
DIMS = 8, 128  # a head's dimension is a multiple of the first, and at most the second


def cudnn(
    cfg: GLMConfig, queries: Array, keys: Array, values: Array, allowed: Array | Visibility,
    apart: Distance | None, layer: Array, heads: Array, dropout_keys: Array | None,
) -> Array:  # fmt: skip
    """Mix values in one fused kernel; see `attention_core.Core`. `attention_cores.choose` says when this is possible.

    cuDNN knows no such mask as ours, so the mask is dense: [B, 1, S, S] in the dtype of the queries, for all heads, and
    no block is left out. Scores are not in memory. They are float32, so that `score_scaling` and `pb_relax`, which only
    keep numbers in range, do nothing.
    """
    assert apart is None
    mask, scale = dense(allowed)[:, None], cfg.head_dim**-0.5  # [B, 1, S, T]
    keys, values = keys.swapaxes(1, 2), values.swapaxes(1, 2)  # [B, T, N, K]
    mixed = jax.nn.dot_product_attention(
        queries, keys, values, mask=mask, scale=scale, implementation=IMPLEMENTATION
    )  # [B, S, N, K]
    return checkpoint_name(mixed, PRODUCT)
