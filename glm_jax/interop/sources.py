"""Arrays of params that are read region by region: on disk, in memory, or computed from others as they are read."""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import jax
import numpy as np

from glm_jax.errors import UserError
from glm_jax.interop.layout import SCALES, VALUES, ZEROS
from glm_jax.model import quantized
from glm_jax.model.quantized import INPUTS, WIDTHS, Quantized, Scheme
from glm_jax.workdir.checkpoint_format import Index, ParamPath

Array = jax.Array


class Source(Protocol):
    """An array that is read region by region."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole array."""
        ...

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        """Read a region, one slice an axis, in the stored dtype or another."""
        ...


@dataclass(frozen=True)
class Live:
    """An array in memory or on devices, as a source."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the array."""
        return self.array.shape

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        """Copy a region to the host."""
        return np.asarray(self.array[index], dtype)


@dataclass(frozen=True)
class Adapted:
    """A kernel with its adapter merged into each region as it is read; see `glm_jax.model.lora.merge`."""

    kernel: Source  # [L, inputs, outputs]
    a: Source  # [L, inputs, r]
    b: Source  # [L, r, outputs]
    scale: float

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return self.kernel.shape

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        """Read a region, merged in float32."""
        inputs = len(self.a.shape) - 1  # axes of `a` before r, with L
        a = self.a.read((*index[:inputs], slice(0, self.a.shape[-1])), np.dtype(np.float32))
        b = self.b.read((index[0], slice(0, self.b.shape[1]), *index[inputs:]), np.dtype(np.float32))
        product = np.stack([np.tensordot(of_layer, b[layer], 1) for layer, of_layer in enumerate(a)])
        merged = self.kernel.read(index, np.dtype(np.float32)) + np.float32(self.scale) * product
        return merged if dtype is None else merged.astype(dtype, copy=False)


@dataclass(frozen=True)
class Repeated:
    """The scales of groups, with each repeated until there are as many as `shape` says."""

    source: Source
    shape: tuple[int, ...]

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        """Read a region."""
        times = [size // count for size, count in zip(self.shape, self.source.shape, strict=True)]
        bounds = _bounds(index, self.shape)
        outer = ((start // t, -(-stop // t)) for (start, stop), t in zip(bounds, times, strict=True))
        region = self.source.read(_slices(outer), dtype)
        for axis, ((start, stop), t) in enumerate(zip(bounds, times, strict=True)):
            region = np.repeat(region, t, axis).take(range(start % t, start % t + stop - start), axis)
        return region


@dataclass(frozen=True)
class QuantizedSource:
    """A quantised kernel: read as it is, it is one of floats; its parts are sources of their own.

    See `glm_jax.model.quantized.Quantized` for the parts, `bits` and `axis`.
    """

    values: Source
    scales: Source
    zeros: Source | None
    bits: int
    axis: int

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the kernel."""
        return _unpacked(self.values.shape, self.bits, self.axis)

    @property
    def rounding(self) -> quantized.Rounding:
        """How its integers were rounded."""
        return "absmax" if self.zeros is None else "zeropoint"

    def parts(self) -> dict[str, Source]:
        """Return the parts by their names at the end of a path."""
        found = {VALUES: self.values, SCALES: self.scales}
        return found if self.zeros is None else {**found, ZEROS: self.zeros}

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        """Read a region, dequantised: in float16, or another dtype after it."""
        counts = self.scales.shape
        whole = [1 if count == 1 else size // count for size, count in zip(self.shape, counts, strict=True)]
        if self.bits == 4:
            whole[self.axis] = math.lcm(whole[self.axis], 2)
        bounds = _bounds(index, self.shape)
        wider = _outwards(bounds, whole, self.shape)
        values = self.values.read(_packed(wider, self.bits, self.axis))
        groups = _slices(
            (0, 1) if count == 1 else (start * count // size, stop * count // size)
            for (start, stop), count, size in zip(wider, counts, self.shape, strict=True)
        )
        scales, zeros = self.scales.read(groups), None if self.zeros is None else self.zeros.read(groups)
        kernel = Quantized(values, scales, zeros, self.bits, self.axis)
        return np.asarray(_dequantize(kernel, dtype or np.dtype(np.float16)))[_cut(bounds, wider)]


@dataclass(frozen=True)
class _Computed:
    """A part of a quantised kernel, computed from the kernel's floats as it is read.

    A region takes the floats of all groups that it touches.
    """

    kernel: Source
    path: ParamPath
    scheme: Scheme
    part: Literal["values", "scales", "zeros"]

    @property
    def shape(self) -> tuple[int, ...]:
        groups, axis = self._layout
        return _packed_shape(self.kernel.shape, self.scheme.bits, axis) if self.part == VALUES else groups

    @functools.cached_property
    def _layout(self) -> tuple[tuple[int, ...], int]:
        return self.scheme.layout(self.path, self.kernel.shape)

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
        shape, (groups, axis), bits = self.kernel.shape, self._layout, self.scheme.bits
        whole = [size // count for size, count in zip(shape, groups, strict=True)]
        per = list(whole)  # features of the kernel in one entry of this part
        if self.part == VALUES:
            per = [1] * len(shape)
            per[axis] = 8 // bits
        bounds = _bounds(index, self.shape)
        if bits == 4:
            whole[axis] = math.lcm(whole[axis], 2)  # a pair may be of two groups
        wider = _outwards([(start * p, stop * p) for (start, stop), p in zip(bounds, per, strict=True)], whole, shape)
        counts = tuple((stop - start) * g // size for (start, stop), g, size in zip(wider, groups, shape, strict=True))
        kernel = self.kernel.read(_slices(wider), np.dtype(np.float32))
        made = _quantize(kernel, bits, counts, axis, self.scheme.rounding)
        if not np.isfinite(made.scales).all():
            raise quantized.too_large(self.path)
        first = [(start // p, stop // p) for (start, stop), p in zip(wider, per, strict=True)]
        found = np.asarray(getattr(made, self.part))[_cut(bounds, first)]
        return found if dtype is None else found.astype(dtype, copy=False)


_quantize = jax.jit(quantized.quantize, static_argnums=(1, 2, 3, 4))
_dequantize = jax.jit(quantized.dequantize, static_argnums=1)


def flatten(leaves: Iterable[tuple[ParamPath, Array | Quantized]]) -> Iterator[tuple[ParamPath, Source]]:
    """Yield arrays of params, quantised or not, as sources by path."""
    for path, leaf in leaves:
        if isinstance(leaf, Quantized):
            zeros = None if leaf.zeros is None else Live(leaf.zeros)
            yield path, QuantizedSource(Live(leaf.values), Live(leaf.scales), zeros, leaf.bits, leaf.axis)
        else:
            yield path, Live(leaf)


def quantize(parameters: Mapping[ParamPath, Source], scheme: Scheme) -> dict[ParamPath, Source]:
    """Return params whose kernels of blocks are quantised as they are read.

    Raises:
        UserError: they are quantised already, or cannot be packed; while regions are read, a number is not finite in
            float16.
    """

    def one(path: ParamPath, source: Source) -> Source:
        if path not in INPUTS:
            return source
        if isinstance(source, QuantizedSource):
            raise quantized.again(path, source.bits)
        _, axis = scheme.layout(path, source.shape)
        values, scales, zeros = (_Computed(source, path, scheme, part) for part in (VALUES, SCALES, ZEROS))
        return QuantizedSource(values, scales, zeros if scheme.rounding == "zeropoint" else None, scheme.bits, axis)

    return {path: one(path, source) for path, source in parameters.items()}


def join(
    parameters: Mapping[ParamPath, Source], shapes: Mapping[ParamPath, tuple[int, ...]], where: str
) -> dict[ParamPath, Source]:
    """Return params in which the parts of quantised kernels, arrays of their own on disk, stand together.

    Args:
        parameters: by path; those of a quantised kernel have `values`, `scales` and `zeros` at the end.
        shapes: those of the model's arrays by path.
        where: for messages.

    Raises:
        UserError: a part is missing, or does not fit the kernel.
    """
    joined = {path: source for path, source in parameters.items() if path[:-1] not in INPUTS}
    for path in dict.fromkeys(path[:-1] for path in parameters if path[:-1] in INPUTS):
        values, scales, zeros = (parameters.get((*path, part)) for part in (VALUES, SCALES, ZEROS))
        name = ".".join(path)
        if values is None or scales is None:
            missing = VALUES if values is None else SCALES
            raise UserError(f"{where}: {name}.{missing} is missing: quantise the model again")
        shape, axis = shapes[path], INPUTS[path] - len(shapes[path])
        width = next((bits for bits in WIDTHS if _packed_shape(shape, bits, axis) == values.shape), None)
        if width is None:
            raise UserError(f"{where}: {name}.values has shape {list(values.shape)}, which is neither 8 nor 4 bits for "
                            f"each number of {list(shape)}: does the config fit it?")  # fmt: skip
        for part in (scales, scales if zeros is None else zeros):
            if part.shape != scales.shape or not _fits(part.shape, shape, INPUTS[path]):
                raise UserError(f"{where}: {name} has scales of shape {list(part.shape)}, which are not for a kernel "
                                f"of {list(shape)}: quantise the model again")  # fmt: skip
        joined[path] = QuantizedSource(values, scales, zeros, width, axis)
    return joined


def _fits(groups: tuple[int, ...], shape: tuple[int, ...], inputs: int) -> bool:
    """Whether scales of shape `groups` are for a kernel of `shape`: groups along the inputs alone."""
    if len(groups) != len(shape):
        return False
    along = [0 < count <= size and size % count == 0 for count, size in zip(groups, shape, strict=True)]
    whole = [count == size for count, size in zip(groups, shape, strict=True)]
    return whole[0] and all(along[1 : 1 + inputs]) and all(whole[1 + inputs :])


def split(parameters: Mapping[ParamPath, Source]) -> dict[ParamPath, Source]:
    """Undo `join`: the parts of quantised kernels by paths of their own."""
    return {
        (*path, *end): part
        for path, source in parameters.items()
        for end, part in (
            [((name,), part) for name, part in source.parts().items()]
            if isinstance(source, QuantizedSource)
            else [((), source)]
        )
    }


class Summary(NamedTuple):
    """How the kernels of a model are quantised, as a checkpoint's record says it."""

    bits: int
    rounding: str
    groups: dict[str, int]  # the input features that share a scale, by the kernel's path


def summary(parameters: Mapping[ParamPath, Source]) -> Summary | None:
    """Return how kernels are quantised; None if they are floats."""
    kernels = {path: source for path, source in parameters.items() if isinstance(source, QuantizedSource)}
    if not kernels:
        return None
    first = next(iter(kernels.values()))
    groups = {
        ".".join(path[1:-1]): math.prod(kernel.shape) // math.prod(kernel.scales.shape)
        for path, kernel in kernels.items()
    }
    return Summary(first.bits, first.rounding, groups)


def official(parameters: Mapping[ParamPath, Source], ranks: int) -> dict[ParamPath, Source]:
    """Return params whose scales are as official checkpoints of so many ranks have them: see `Scheme.ranks`.

    Raises:
        UserError: a kernel has other groups, or zero points.
    """

    def one(path: ParamPath, source: Source) -> Source:
        if not isinstance(source, QuantizedSource):
            return source
        first, *others = source.scales.shape[1 : 1 + INPUTS[path]]
        wanted = ranks if path[-2] in quantized.SPLIT_INPUTS else 1
        if source.zeros is not None or any(count > 1 for count in others) or wanted % first:
            raise UserError(
                f"{'.'.join(path)} cannot be written: quantised official checkpoints have no zero points and one scale "
                f"a row on each of {ranks} ranks: quantise the weights with --format=sat --tensor_parallel={ranks}"
            )
        shape = (source.scales.shape[0], wanted, *source.scales.shape[2:])
        return dataclasses.replace(source, scales=Repeated(source.scales, shape))

    return {path: one(path, source) for path, source in parameters.items()}


Bounds = list[tuple[int, int]]


def _bounds(index: Index, shape: tuple[int, ...]) -> Bounds:
    return [part.indices(size)[:2] for part, size in zip(index, shape, strict=True)]


def _slices(bounds: Iterable[tuple[int, int]]) -> Index:
    return tuple(slice(*bound) for bound in bounds)


def _outwards(bounds: Bounds, whole: list[int], shape: tuple[int, ...]) -> Bounds:
    """Move bounds outwards to multiples of `whole`, or to the end of the axis."""
    return [
        (start // unit * unit, min(-(-stop // unit) * unit, size))
        for (start, stop), unit, size in zip(bounds, whole, shape, strict=True)
    ]


def _cut(bounds: Bounds, wider: Bounds) -> Index:
    """Return where `bounds` are in a region of `wider` ones."""
    return _slices((start - first, stop - first) for (start, stop), (first, _) in zip(bounds, wider, strict=True))


def _packed(bounds: Bounds, bits: int, axis: int) -> Index:
    inside = list(bounds)
    inside[axis] = (bounds[axis][0] * bits // 8, bounds[axis][1] * bits // 8)
    return _slices(inside)


def _packed_shape(shape: tuple[int, ...], bits: int, axis: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = sizes[axis] * bits // 8
    return tuple(sizes)


def _unpacked(shape: tuple[int, ...], bits: int, axis: int) -> tuple[int, ...]:
    sizes = list(shape)
    sizes[axis] = sizes[axis] * 8 // bits
    return tuple(sizes)
