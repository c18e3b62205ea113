"""The feed-forward sublayer: GeGLU as in GLM-130B, or plain GELU."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import NORMAL_STDDEV, ONE_DEVICE, Affine, TensorAxis, xavier_stddev
from glm_jax.model.residual import depth_coefficients

Array = jax.Array


@jax.custom_jvp
def gelu(x: Array) -> Array:
    """Compute the exact GELU, x times the normal distribution's cdf, of each entry (arXiv 1606.08415).

    The derivative is explicit: jax 0.12.0 cannot differentiate erfc inside a shard_map that tracks varying axes.
    """
    return x * normal_cdf(x)


@gelu.defjvp
def _gelu_jvp(primals: tuple[Array], tangents: tuple[Array]) -> tuple[Array, Array]:
    (x,), (tangent,) = primals, tangents
    cdf = normal_cdf(x)
    density = jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5
    return x * cdf, (cdf + x * density) * tangent


def normal_cdf(x: Array) -> Array:
    """Compute the standard normal cdf of each entry; erfc keeps the digits of the lower tail."""
    return 0.5 * jax.lax.erfc(-x * 0.5**0.5)


def feedforward_stddevs(cfg: GLMConfig) -> tuple[float, float]:
    """Return the standard deviations of the up kernel (each half counts as one matrix) and of the down kernel."""
    if cfg.initialisation == "normal":
        return NORMAL_STDDEV, NORMAL_STDDEV * (2 * cfg.num_layers) ** -0.5
    gains = depth_coefficients(cfg.norm, cfg.num_layers)
    shape = (cfg.hidden_size, cfg.ffn_size)
    return xavier_stddev(*shape, gains.up_gain), xavier_stddev(*shape, gains.down_gain)


class FeedForward(nn.Module):
    """D -> F -> D. GeGLU multiplies the first half by the exact GELU of the second (arXiv 2002.05202)."""

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, S, D] -> [B, S, D]."""
        cfg, width, inner = self.cfg, self.cfg.hidden_size, self.cfg.ffn_size // self.axis.size
        up_stddev, down_stddev = feedforward_stddevs(cfg)
        halves, bias = Affine(
            (width, cfg.up_projections, inner), ("hidden", None, "ffn"), up_stddev, inputs=1, name="up"
        )("bsd,dcf->cbsf", self.axis.enter(x))  # [2, B, S, F], [2, F]; without a gate 1 in the place of 2
        halves = halves + bias[:, None, None]  # [2, B, S, F]
        if cfg.activation == "geglu":
            inner_x = halves[0] * gelu(halves[1])  # [B, S, F]
        else:
            inner_x = jax.nn.gelu(halves[0]) if cfg.activation == "gelu_tanh" else gelu(halves[0])  # [B, S, F]
        down = Affine((inner, width), ("ffn", "hidden"), down_stddev, inputs=1, name="down")
        partial, bias = down("bsf,fd->bsd", inner_x)  # [B, S, D], [D]
        return self.axis.leave(partial) + bias  # [B, S, D]
