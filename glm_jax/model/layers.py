"""Small pieces that every block shares: layer norm, dropout, initialisers, and the tensor axis of one device."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.model import quantized
from glm_jax.types import Tree

Array = jax.Array

NORMAL_STDDEV = 0.02  # the original GLM's initialisation


class TensorAxis(Protocol):
    """How sharded matmuls and the sharded vocabulary join the rest of the model; the defaults are for one device.

    A block brackets each pair of matmuls: `enter` before the first (whose output features are sharded), `leave` after
    the second (whose result is a partial sum). parallel/tensor.py has one whose methods are collectives; with it, x
    between the pairs holds a slice of the sequence.
    """

    @property
    def size(self) -> int:
        """The number of members over which the heads, the feed-forward features and the sequence are split."""
        return 1

    @property
    def vocab_shards(self) -> int:
        """The number of members over which the rows of the word embedding are split."""
        return 1

    def part(self, count: int) -> Array:
        """Return which of `count` heads this member holds: int32 [count / size]."""
        return jnp.arange(count)

    def tokens(self, count: int) -> Array:
        """Return which of `count` tokens x holds between pairs of matmuls: int32."""
        return jnp.arange(count)

    def enter(self, x: Array) -> Array:
        """Make x [B, S, D] whole on every member before a matmul with sharded output features."""
        return x

    def leave(self, x: Array) -> Array:
        """Sum the members' partial results x [B, S, D]."""
        return x

    def lookup(self, table: Array, tokens: Array) -> Array:
        """Look up tokens [B, S] in the word embedding [V, D] -> [B, S, D]."""
        return jnp.take(table, tokens, axis=0)


class OneDevice(TensorAxis):
    """The axis of a single device: every method does what the default does."""


ONE_DEVICE = OneDevice()
PRODUCT = "product"  # the checkpoint_name of what is dear to compute again


def at_least_float32(x: Array) -> Array:
    """Widen to float32; float64 stays as it is."""
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def row_keys(key: Array | None, rows: Array) -> Array | None:
    """Return a dropout key for each of `rows`, int32 [B]: keys [B], the same however the batch is split."""
    return None if key is None else jax.vmap(jax.random.fold_in, (None, 0))(key, rows)


def fold_in(keys: Array | None, index: Array | int) -> Array | None:
    """Derive new keys [B] from the rows' keys [B]."""
    return None if keys is None else jax.vmap(jax.random.fold_in, (0, None))(keys, index)


def dropout(x: Array, rate: float, keys: Array | None, places: Array) -> Array:
    """Zero each entry of x [B, n, ...] with probability `rate` and scale the rest by 1 / (1 - rate).

    The bits of x[b, i] follow from keys[b] and places[i] alone. So a device that holds some rows, and some heads or
    tokens (`places`, int32 [n]), draws what a single device draws for the whole. Without keys, return x.

    A row's key is the step's key, folded with the row's index in the batch; then with 0 for the embedding, or with
    layer + 1 and 0, 1 or 2 for the attention probabilities, the attention output and the feed-forward output.
    """
    if keys is None or rate == 0.0:
        return x

    def keep(key: Array, place: Array) -> Array:
        return jax.random.bernoulli(jax.random.fold_in(key, place), 1.0 - rate, x.shape[2:])

    kept = jax.vmap(jax.vmap(keep, (None, 0)), (0, None))(keys, places)  # [B, n, ...]
    return jnp.where(kept, x / (1.0 - rate), 0).astype(x.dtype)


def param(
    module: nn.Module,
    name: str,
    initialiser: Callable[..., Array],
    axes: tuple[str | None, ...],
    shape: tuple[int, ...],
) -> Array:
    """Declare one parameter of a module, naming the logical axis of each dimension (None is never sharded)."""
    value = module.param(name, nn.with_partitioning(initialiser, axes), shape)
    return cast(Array, value)  # flax's type includes the box with the names, which `param` takes off


def run(module: nn.Module, weights: Tree, *arguments: Tree) -> Tree:
    """Call a module as a pure function of its weights."""
    return module.apply({"params": weights}, *arguments)


class LayerNorm(nn.Module):
    """Layer norm over the last axis, statistics in float32 (biased variance).

    Attributes:
        epsilon: added to the variance.
        axis: the logical axis of the params, for parallel/partition.py; None is never sharded.
        bias: whether there is one beside the scale.
    """

    epsilon: float
    axis: str | None = "hidden"
    bias: bool = True

    @nn.compact
    def __call__(self, x: Array) -> Array:
        """x [..., D] -> [..., D] in the dtype of x."""
        width = x.shape[-1]
        scale = param(self, "scale", nn.initializers.ones, (self.axis,), (width,))  # [D]
        bias = param(self, "bias", nn.initializers.zeros, (self.axis,), (width,)) if self.bias else 0.0  # [D]
        wide = at_least_float32(x)  # [..., D]
        mean = jnp.mean(wide, axis=-1, keepdims=True)  # [..., 1]
        centred = wide - mean  # [..., D]
        variance = jnp.mean(centred * centred, axis=-1, keepdims=True)  # [..., 1]
        normed = centred * jax.lax.rsqrt(variance + self.epsilon)  # [..., D]
        return (normed * scale + bias).astype(x.dtype)  # [..., D]


class Affine(nn.Module):
    """One projection. The caller adds the bias, since it may have to wait for a collective.

    Attributes:
        shape: of the kernel, input axes first.
        axes: the logical axis of each kernel axis, for parallel/partition.py; None is never sharded.
        stddev: of the kernel's initial normal distribution; an array broadcasts to the shape. Biases start at zero.
        inputs: the number of leading axes that the product sums over; the bias has the others.
    """

    shape: tuple[int, ...]
    axes: tuple[str | None, ...]
    stddev: np.ndarray | float
    inputs: int

    @nn.compact
    def __call__(self, equation: str, x: Array) -> tuple[Array, Array]:
        """Return the product of x and the kernel [*inputs, *outputs], an einsum, and the bias [*outputs]."""

        def normal(key: Array, shape: tuple[int, ...]) -> Array:
            return jax.random.normal(key, shape) * jnp.asarray(self.stddev, jnp.float32)

        kernel = self.get_variable("params", "kernel")  # `param` takes arrays alone; there is none before `init`
        if not quantized.is_quantized(kernel):
            kernel = param(self, "kernel", normal, self.axes, self.shape)
        bias_axes, bias_shape = self.axes[self.inputs :], self.shape[self.inputs :]
        bias = param(self, "bias", nn.initializers.zeros, bias_axes, bias_shape)
        return quantized.einsum(equation, x, kernel), bias


def xavier_stddev(rows: int, columns: int, gain: float = 1.0) -> float:
    """Return Xavier's standard deviation for one whole matrix, however it is stored or sharded."""
    return gain * (2.0 / (rows + columns)) ** 0.5
