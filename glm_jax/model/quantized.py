"""Weights of 8 or 4 bits: what stands in params in the place of a kernel of blocks, and the rounding of the release.

Only the kernels are quantised, and only as they lie in memory: `einsum` dequantises a kernel where it is multiplied
(W8A16 and W4A16, the paper's section 3.4). Embedding, norms and biases stay as they are.

A scale belongs to one output feature and to a group of input features. Per row there is one group, and the official
checkpoints, which are quantised after they are split over ranks, have one group a rank where a rank holds some of the
inputs. Scales have the axes of the kernel, with the number of groups in the place of each size.
"""

from __future__ import annotations

import dataclasses
import functools
import math
import re
from collections.abc import Mapping, Sequence
from typing import Literal

import jax
import jax.numpy as jnp
from jax.typing import DTypeLike

from glm_jax.errors import UserError
from glm_jax.types import Tree

Array = jax.Array
Rounding = Literal["absmax", "zeropoint"]

WIDTHS = (8, 4)  # bits
GROUPS = {8: 0, 4: 128}  # of a Scheme, by default: 4 bits a row are too coarse for models smaller than GLM-130B
ROUNDINGS = ("absmax", "zeropoint")
# The kernels of a block and how many axes of inputs each has. The others are its outputs.
INPUTS: Mapping[tuple[str, ...], int] = {
    ("blocks", "attention", "qkv", "kernel"): 1,  # [L, D, N, 3, K]
    ("blocks", "attention", "output", "kernel"): 2,  # [L, N, K, D]
    ("blocks", "feedforward", "up", "kernel"): 1,  # [L, D, 2, F]
    ("blocks", "feedforward", "down", "kernel"): 1,  # [L, F, D]
}
SPLIT_INPUTS = ("output", "down")  # those whose inputs tensor-parallel ranks split
CPU_PARTS = 8  # of a product, see `einsum`


@dataclasses.dataclass(frozen=True)
class Scheme:
    """How to quantise a model.

    Attributes:
        bits: 8 or 4.
        group: the most input features that share a scale; a kernel takes the largest divisor of its inputs up to it.
            0 is all of them.
        rounding: see `quantize`.
        ranks: with group 0, a scale for the inputs of each of so many tensor-parallel ranks, as official checkpoints
            have them.

    Raises:
        UserError: a value is not one of these.
    """

    bits: int
    group: int = 0
    rounding: Rounding = "absmax"
    ranks: int = 1

    def __post_init__(self) -> None:
        if self.bits not in WIDTHS:
            raise UserError(f"weights of {self.bits} bits are not supported: choose 8 or 4")
        if self.rounding not in ROUNDINGS:
            raise UserError(f"rounding {self.rounding!r} is unknown: choose {' or '.join(ROUNDINGS)}")
        if self.group < 0:
            raise UserError(f"a group of {self.group} input features is not possible: choose 1 or more, or 0 for all")

    def layout(self, path: tuple[str, ...], shape: Sequence[int]) -> tuple[tuple[int, ...], int]:
        """Return `groups` and `axis` of `quantize` for the kernel of `shape` at `path` (a key of INPUTS).

        Raises:
            UserError: 4 bits cannot be packed, because the axis of inputs is odd on a rank.
        """
        inputs = INPUTS[path]
        axis, counts = inputs - len(shape), [1] * inputs
        if self.group:
            counts = _counts(shape[1 : 1 + inputs], self.group)
        elif path[-2] in SPLIT_INPUTS:
            counts[0] = self.ranks
        check_even(path, self.bits, shape[axis] // (self.ranks if path[-2] == "down" else 1))
        return (shape[0], *counts, *shape[1 + inputs :]), axis


def _counts(inputs: Sequence[int], group: int) -> list[int]:
    """Return the number of groups along each axis of inputs, for the largest groups of up to `group` features."""
    *outer, inner = inputs
    largest = max(size for size in range(1, group + 1) if inner % size == 0)
    if largest < inner or not outer:
        return [*outer, inner // largest]
    whole = max(count for count in range(1, group // inner + 1) if outer[0] % count == 0)
    return [outer[0] // whole, 1]


def check_even(path: tuple[str, ...], bits: int, size: int) -> None:
    """Check that the packed axis of a kernel, of `size` on a rank, takes values of `bits`.

    Raises:
        UserError: it does not.
    """
    if bits == 4 and size % 2:
        raise UserError(f"{'.'.join(path)} has {size} input features side by side, and 4 bits are packed in pairs: "
                        "choose 8 bits")  # fmt: skip


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=("values", "scales", "zeros"), meta_fields=("bits", "axis")
)
@dataclasses.dataclass(frozen=True)
class Quantized:
    """A kernel as integers q and scales s: it is s (q + z), or s q without zero points.

    Attributes:
        values: int8, in the shape of the kernel; with 4 bits two to a byte, so that `axis` has half its size.
        scales: float16, as many axes; the kernel's size is a multiple of each.
        zeros: int32, in the shape of scales: the z of `zeropoint` rounding; None with `absmax`.
        bits: 8 or 4.
        axis: the packed one, the last of the inputs, counted from the end so that a layer's part has the same.
    """

    values: Tree  # an array, or what stands for one: a shape, a spec, a sharding
    scales: Tree
    zeros: Tree
    bits: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        shape = list(self.values.shape)
        shape[self.axis] *= 8 // self.bits
        return tuple(shape)


def pack(integers: Array, axis: int) -> Array:
    """Pack int8 values of -8..7 two to a byte along an axis of even size: the even one in the high half."""
    even, odd = (jax.lax.slice_in_dim(integers, start, None, 2, axis) for start in (0, 1))
    return (even << 4) | (odd & 15)


def unpack(packed: Array, axis: int) -> Array:
    """Undo `pack`."""
    axis %= packed.ndim
    halves = jnp.stack([packed >> 4, (packed << 4) >> 4], axis + 1)  # int8 shifts keep the sign
    return halves.reshape(*packed.shape[:axis], -1, *packed.shape[axis + 1 :])


def quantize(kernel: Array, bits: int, groups: tuple[int, ...], axis: int, rounding: Rounding = "absmax") -> Quantized:
    """Quantise a kernel, computing in float16 as the release does.

    With n = 2^(bits - 1) - 1, `absmax` (the release's) takes s = max|w| / n and q = round(w / s). `zeropoint`
    (the paper's appendix on quantisation) takes s = (max - min) / 2n, z = round(min / s) + n and q = round(w / s) - z.
    Halves round to even; what rounding lifts out of the range of the integers is clipped to it. A group of zeros gets
    a scale of 0.

    Args:
        kernel: of numbers that float16 holds.
        bits: 8 or 4.
        groups: the shape of the scales; each of its sizes divides the kernel's.
        axis: to pack 4 bits along, from the end; its size is even.
        rounding: "absmax" or "zeropoint".
    """
    kernel = _half(kernel.astype(jnp.float32))
    split = [part for count, size in zip(groups, kernel.shape, strict=True) for part in (count, size // count)]
    within = tuple(range(1, len(split), 2))  # the axes inside a group
    grouped = kernel.reshape(split)
    highest = 2 ** (bits - 1) - 1
    if rounding == "absmax":
        scales = _half(jnp.max(jnp.abs(grouped), within, keepdims=True) / highest)
        zeros = jnp.zeros_like(scales)
        integers = jnp.round(_half(grouped / _divisor(scales)))
    else:
        low, high = (reduce(grouped, within, keepdims=True) for reduce in (jnp.min, jnp.max))
        # a group of equal numbers has no range: one step from 0 is then the number
        scales = _half(jnp.where(low == high, jnp.abs(low), (high - low) / (2 * highest)))
        zeros = jnp.round(low / _divisor(scales)) + highest
        integers = jnp.round(grouped / _divisor(scales)) - zeros
    values = jnp.clip(integers, -highest - 1, highest).astype(jnp.int8).reshape(kernel.shape)
    return Quantized(
        pack(values, axis) if bits == 4 else values,
        scales.reshape(groups).astype(jnp.float16),
        None if rounding == "absmax" else zeros.reshape(groups).astype(jnp.int32),
        bits,
        axis,
    )


def _half(x: Array) -> Array:
    """Round float32 to the numbers of float16, still as float32.

    Inside a fusion XLA drops a cast to float16 and back, and reduce_precision alone turns subnormal numbers into 0.
    """
    subnormal = jnp.round(x * 2.0**24) * 2.0**-24
    return jnp.where(jnp.abs(x) < 2.0**-14, subnormal, jax.lax.reduce_precision(x, 5, 10))


def _divisor(scales: Array) -> Array:
    return jnp.where(scales == 0, 1, scales)


def dequantize(kernel: Quantized, dtype: DTypeLike) -> Array:
    """Return the kernel in `dtype`. The product is rounded to float16 first, as in the release."""
    integers = unpack(kernel.values, kernel.axis) if kernel.bits == 4 else kernel.values
    scales = _spread(kernel.scales, integers.shape)
    if kernel.zeros is not None:  # q + z may be too large for float16
        shifted = integers + _spread(kernel.zeros, integers.shape)
        return _half(shifted.astype(jnp.float32) * scales.astype(jnp.float32)).astype(dtype)
    return (integers.astype(jnp.float16) * scales).astype(dtype)


def _spread(groups: Array, shape: tuple[int, ...]) -> Array:
    """Give each number of a group the number that the group has; groups of a whole axis are left to broadcast."""
    for axis, (count, size) in enumerate(zip(groups.shape, shape, strict=True)):
        if count not in (1, size):
            groups = jnp.repeat(groups, size // count, axis)
    return groups


def einsum(equation: str, x: Array, kernel: Array | Quantized) -> Array:
    """Compute jnp.einsum(equation, x, kernel) in the dtype of x, dequantising the kernel for it.

    XLA's CPU backend would write out the whole kernel, in float32 eight times the size of 4 bits. So there, some of the
    output features are dequantised and multiplied at a time. Which of the two runs follows from the platform that the
    program is compiled for, whatever this process has.
    """
    if not isinstance(kernel, Quantized):
        return _contract(equation, x, kernel)

    def whole(x: Array, kernel: Quantized) -> Array:
        return _contract(equation, x, dequantize(kernel, x.dtype))

    return jax.lax.platform_dependent(x, kernel, cpu=functools.partial(_einsum_in_parts, equation), default=whole)


def _einsum_in_parts(equation: str, x: Array, kernel: Quantized) -> Array:
    """Compute the einsum for some of the output features at a time."""
    along = max(range(kernel.axis + 1, 0), key=lambda axis: math.gcd(kernel.shape[axis], CPU_PARTS))
    parts = math.gcd(kernel.shape[along], CPU_PARTS)
    size = kernel.shape[along] // parts

    def multiply(part: Array) -> Array:
        of_part = jax.tree.map(lambda array: jax.lax.dynamic_slice_in_dim(array, part * size, size, along), kernel)
        return _contract(equation, x, dequantize(of_part, x.dtype))

    if parts == 1:
        return multiply(jnp.int32(0))
    _, letters, product = re.split(",|->", equation)
    place = product.index(letters[along])
    products = jnp.moveaxis(jax.lax.map(multiply, jnp.arange(parts)), 0, place)  # the axis `along` in two
    return products.reshape(*products.shape[:place], -1, *products.shape[place + 2 :])


def _contract(equation: str, x: Array, kernel: Array) -> Array:
    """Compute jnp.einsum(equation, x, kernel), where the last axes of x are the first of the kernel."""
    of_x, of_kernel, product = re.split(",|->", equation)
    plain = [letter for letter in of_x + of_kernel if letter in product]
    made = multiply(x, kernel, sum(letter not in product for letter in of_x))
    return made.transpose([plain.index(letter) for letter in product])


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def multiply(x: Array, kernel: Array, inputs: int) -> Array:
    """Sum over the last `inputs` axes of x, which are the first of the kernel: [..., *I], [*I, *O] -> [..., *O].

    The product and its gradients are those of two matrices: with more axes XLA's CPU backend is slower. What the
    backward pass needs are x and the kernel as they came, so that one who has the kernel need not keep it.
    """
    size = math.prod(kernel.shape[:inputs])
    made = x.reshape(-1, size) @ kernel.reshape(size, -1)
    return made.reshape(*x.shape[: x.ndim - inputs], *kernel.shape[inputs:])


def _multiply_backward(inputs: int, residuals: tuple[Array, Array], gradient: Array) -> tuple[Array, Array]:
    x, kernel = residuals
    size = math.prod(kernel.shape[:inputs])
    rows, columns = x.reshape(-1, size), kernel.reshape(size, -1)
    gradient = gradient.reshape(len(rows), -1)
    return (gradient @ columns.T).reshape(x.shape), (rows.T @ gradient).reshape(kernel.shape)


multiply.defvjp(lambda x, kernel, inputs: (multiply(x, kernel, inputs), (x, kernel)), _multiply_backward)


def quantize_params(params: Tree, scheme: Scheme) -> Tree:
    """Return params with the kernels of blocks quantised, one after another; the rest as it is.

    Args:
        params: as `glm_jax.model.init` gives them, on any devices.
        scheme: how.

    Raises:
        UserError: they are quantised already, have a number that float16 lacks, or an axis that cannot be packed.
    """

    def one(keys: Sequence[object], kernel: Array | Quantized) -> Array | Quantized:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if path not in INPUTS:
            return kernel
        if isinstance(kernel, Quantized):
            raise again(path, kernel.bits)
        groups, axis = scheme.layout(path, kernel.shape)
        made = _quantize(kernel, scheme.bits, groups, axis, scheme.rounding)
        if not jnp.isfinite(made.scales).all():
            raise too_large(path)
        return made

    return jax.tree.map_with_path(one, params, is_leaf=is_quantized)


_quantize = jax.jit(quantize, static_argnums=(1, 2, 3, 4))


def too_large(path: tuple[str, ...]) -> UserError:
    """Return the error for a kernel with a number that float16 lacks."""
    return UserError(f"{'.'.join(path)} has a number that is not finite in float16, in which weights are quantised: "
                     "use the weights as they are")  # fmt: skip


def again(path: tuple[str, ...], bits: int) -> UserError:
    """Return the error for a kernel that is quantised already."""
    return UserError(f"{'.'.join(path)} has {bits} bits already: quantise the weights that it came from")


def is_quantized(node: object) -> bool:
    """Whether a node of a tree stands for a quantised kernel."""
    return isinstance(node, Quantized)


def logical_axes(axes: Tree, params: Tree) -> Tree:
    """Return the logical axes of params that may be quantised: parallel/partition.py turns them into specs.

    Values are split as the kernel is, and so are scales, except along an axis with one group: it is whole everywhere.

    Args:
        axes: of the model, from `glm_jax.model.logical_axes`.
        params: arrays or their shapes, with a `Quantized` in the place of some kernels.
    """

    def one(array: object, names: tuple[str | None, ...]) -> object:
        if not isinstance(array, Quantized):
            return names
        of_groups = tuple(name if size > 1 else None for name, size in zip(names, array.scales.shape, strict=True))
        return dataclasses.replace(
            array, values=names, scales=of_groups, zeros=None if array.zeros is None else of_groups
        )

    return jax.tree.map(one, params, axes, is_leaf=is_quantized)


def split_groups(groups: tuple[int, ...], pieces: Sequence[int]) -> tuple[int, ...]:
    """Return the shape that scales of shape `groups` need to be split into `pieces` along each axis.

    Groups of a whole axis stay; others are repeated until the pieces divide them.
    """
    return tuple(count if count == 1 else math.lcm(count, piece) for count, piece in zip(groups, pieces, strict=True))


def fit(params: Tree, axes: Tree, members: Mapping[str, int]) -> Tree:
    """Repeat the scales of quantised kernels where a mesh could not split them: 2 groups over 4 members become 4.

    Args:
        params: with a `Quantized` in the place of some kernels.
        axes: from `logical_axes`.
        members: the number of members that split a logical axis, by its name; 1 if it is not named.

    Raises:
        UserError: the members do not divide the packed axis of some kernel.
    """

    def one(kernel: Array | Quantized, names: Quantized) -> Array | Quantized:
        if not isinstance(kernel, Quantized):
            return kernel
        pieces = [members.get(name or "", 1) for name in names.scales]
        whole = [members.get(name or "", 1) for name in names.values]
        if kernel.values.shape[kernel.axis] % whole[kernel.axis]:
            raise UserError(f"{kernel.shape[kernel.axis]} input features of {kernel.bits} bits cannot be split over "
                            f"{whole[kernel.axis]} devices: choose 8 bits, or fewer of them")  # fmt: skip
        target = split_groups(kernel.scales.shape, pieces)
        zeros = None if kernel.zeros is None else _spread(kernel.zeros, target)
        return dataclasses.replace(kernel, scales=_spread(kernel.scales, target), zeros=zeros)

    return jax.tree.map(one, params, axes, is_leaf=is_quantized)
