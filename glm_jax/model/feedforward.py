"""The feed-forward sublayer: GeGLU as in GLM-130B, or plain GELU."""

from __future__ import annotations

import math

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import NORMAL_STDDEV, ONE_DEVICE, PRODUCT, Affine, TensorAxis, xavier_stddev
from glm_jax.model.residual import depth_coefficients

Array = jax.Array


@jax.custom_vjp
def gelu(x: Array) -> Array:
    """Compute the exact GELU, x times the normal distribution's cdf, of each entry (arXiv 1606.08415).

    The derivative is explicit: jax 0.12.0 cannot differentiate erf inside a shard_map that tracks varying axes.
    """
    return x * normal_cdf(x)


def gelu_derivative(x: Array) -> Array:
    """Compute the derivative of `gelu` at each entry."""
    return normal_cdf(x) + x * jnp.exp(-0.5 * x * x) * (2 * math.pi) ** -0.5


def normal_cdf(x: Array) -> Array:
    """Compute the standard normal cdf of each entry; erf takes half the time of erfc, which keeps the tail's digits."""
    return 0.5 * (1 + jax.lax.erf(x * 0.5**0.5))


gelu.defvjp(lambda x: (gelu(x), x), lambda x, gradient: (gradient * gelu_derivative(x),))


@jax.custom_vjp
def geglu(halves: Array) -> Array:
    """Multiply the first half by the GELU of the second: [..., 2, F] -> [..., F] (arXiv 2002.05202).

    The backward pass needs the halves alone, and computes the GELU again.
    """
    return halves[..., 0, :] * gelu(halves[..., 1, :])


def _geglu_backward(halves: Array, gradient: Array) -> tuple[Array]:
    first, gate = halves[..., 0, :], halves[..., 1, :]
    of_halves = jnp.stack([gradient * gelu(gate), gradient * first * gelu_derivative(gate)], axis=-2)
    return (jax.lax.optimization_barrier(of_halves),)  # or XLA computes it for each of its three uses


geglu.defvjp(lambda halves: (geglu(halves), halves), _geglu_backward)


def feedforward_stddevs(cfg: GLMConfig) -> tuple[float, float]:
    """Return the standard deviations of the up kernel (each half counts as one matrix) and of the down kernel."""
    if cfg.initialisation == "normal":
        return NORMAL_STDDEV, NORMAL_STDDEV * (2 * cfg.num_layers) ** -0.5
    gains = depth_coefficients(cfg.norm, cfg.num_layers)
    shape = (cfg.hidden_size, cfg.ffn_size)
    return xavier_stddev(*shape, gains.up_gain), xavier_stddev(*shape, gains.down_gain)


class FeedForward(nn.Module):
    """D -> F -> D, with GeGLU or one of two GELUs between."""

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [B, S, D] -> [B, S, D]."""
        cfg, width, inner = self.cfg, self.cfg.hidden_size, self.cfg.ffn_size // self.axis.size
        up_stddev, down_stddev = feedforward_stddevs(cfg)
        halves, bias = Affine(
            (width, cfg.up_projections, inner), ("hidden", None, "ffn"), up_stddev, inputs=1, name="up"
        )("bsd,dcf->bscf", self.axis.enter(x))  # [B, S, 2, F], [2, F]; without a gate 1 in the place of 2
        halves = checkpoint_name(halves, PRODUCT) + bias  # [B, S, 2, F]
        if cfg.activation == "geglu":
            inner_x = geglu(halves)  # [B, S, F]
        else:
            activate = jax.nn.gelu if cfg.activation == "gelu_tanh" else gelu
            inner_x = activate(halves[:, :, 0])  # [B, S, F]
        down = Affine((inner, width), ("ffn", "hidden"), down_stddev, inputs=1, name="down")
        partial, bias = down("bsf,fd->bsd", inner_x)  # [B, S, D], [D]
        return checkpoint_name(self.axis.leave(partial), PRODUCT) + bias  # [B, S, D]
