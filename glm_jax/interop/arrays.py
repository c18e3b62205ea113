"""Params between files and devices, whatever the files' layout: loaded onto meshes and written out in chunks."""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import UserError
from glm_jax.interop.layout import SAT, Layout, Rule, axis_sizes, official_tensors, tile_shape, tiles
from glm_jax.interop.torch_archive import DTYPES, TensorStream
from glm_jax.model import GLMConfig, init
from glm_jax.model.transformer import Params
from glm_jax.types import Tree
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
class _Live:
    """An array in memory or on devices, as a source."""

    array: Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.array.shape

    def read(self, index: Index, dtype: np.dtype | None = None, /) -> np.ndarray:
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


def sources(params: Params) -> dict[ParamPath, Source]:
    """Return the arrays of params by path, to be written."""
    return {path: _Live(array) for path, array in leaves(params).items()}


def load(parameters: Mapping[ParamPath, Source], shardings: Tree | None = None) -> Params:
    """Load params onto devices, reading of the files what this process's devices hold.

    Beyond the arrays themselves the host needs memory for one chunk.

    Args:
        parameters: an opened checkpoint.
        shardings: a jax Sharding for each array, nested as params; None is the default device.

    Returns:
        float32 params as `glm_jax.model.init` gives them.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays = {}
    for param_path, parameter in parameters.items():
        sharding = (
            device if shardings is None else functools.reduce(lambda node, name: node[name], param_path, shardings)
        )
        arrays[param_path] = fill(jnp.zeros(parameter.shape, jnp.float32, device=sharding), parameter)
    return nest(arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: Array, chunk: Array, start: list[Array]) -> Array:
    return jax.lax.dynamic_update_slice(whole, chunk, start)


def fill(array: Array, source: Source) -> Array:
    """Overwrite an array, chunk by chunk, with as much of `source` as fits; what lies beyond it stays.

    Args:
        array: float32, on any mesh; it is donated. Devices with the same part share the reading.
        source: as many axes; each may be longer or shorter than the array's.
    """
    owners = collections.defaultdict(list)
    for shard in array.addressable_shards:
        bounds = zip(shard.index, array.shape, strict=True)
        owners[tuple(part.indices(size)[:2] for part, size in bounds)].append(shard.data)
    shards = []
    for bounds, parts in owners.items():
        shape = tuple(max(0, min(stop, size) - start) for (start, stop), size in zip(bounds, source.shape, strict=True))
        for region in tiles(shape, tile_shape(shape)) if all(shape) else ():
            index = tuple(slice(b[0] + r.start, b[0] + r.stop) for b, r in zip(bounds, region, strict=True))
            chunk = source.read(index, np.dtype(np.float32))
            start = [np.int32(part.start) for part in region]
            parts = [_update(part, jax.device_put(chunk, part.device), start) for part in parts]
            jax.block_until_ready(parts)  # else the chunks pile up behind the transfers
        shards += parts
    return jax.make_array_from_single_device_arrays(array.shape, array.sharding, shards)


def nest(flat: Mapping[ParamPath, object]) -> Tree:
    """Turn {path: leaf} into nested dicts."""
    tree: Tree = {}
    for (*parents, last), leaf in flat.items():
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


def leaves(params: Params) -> dict[ParamPath, Array]:
    """Undo `nest`."""
    flat = jax.tree_util.tree_leaves_with_path(params)
    return {tuple(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in flat}


def check_shapes(cfg: GLMConfig, shapes: Mapping[ParamPath, tuple[int, ...]], where: str) -> None:
    """Check the arrays of a params tree against cfg.

    Raises:
        UserError: one is missing, unknown or of another shape; the message starts with `where`.
    """
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    wanted = {param_path: tuple(leaf.shape) for param_path, leaf in leaves(params).items()}
    for param_path in sorted(wanted.keys() | shapes.keys()):
        name = ".".join(param_path)
        if param_path not in shapes:
            raise UserError(f"{where}: {name} is missing")
        if param_path not in wanted:
            raise UserError(f"{where}: {name} is not an array of this model: does the config fit it?")
        if shapes[param_path] != wanted[param_path]:
            raise UserError(
                f"{where}: {name} has shape {list(shapes[param_path])}, the config wants {list(wanted[param_path])}"
            )


def streams(
    cfg: GLMConfig,
    sources: Mapping[ParamPath, Source],
    dtype: str,
    *,
    layout: Layout = SAT,
    ranks: int = 1,
    rank: int = 0,
) -> dict[str, TensorStream]:
    """Return one rank's official tensors, whose chunks are read and turned when they are written.

    Args:
        cfg: the model.
        sources: the arrays of params by path.
        dtype: of the tensors, a key of `torch_archive.DTYPES`.
        layout, ranks, rank: the names of tensors, the number of tensor-parallel ranks and which of them.

    Raises:
        UserError: the shapes are not cfg's; while chunks are drawn, a value does not fit dtype.
    """
    check_shapes(cfg, {param_path: tuple(source.shape) for param_path, source in sources.items()}, "params")
    kind, sizes, tensors = DTYPES[dtype][1], axis_sizes(cfg), {}
    for name, rule, layer in official_tensors(cfg, layout):
        chunks = _chunks(name, rule, layer, sources[rule.path], rule.view_shape(sizes, ranks), rank, kind)
        tensors[name] = TensorStream(rule.torch_shape(sizes, ranks), kind, chunks)
    return tensors


def _chunks(
    name: str,
    rule: Rule,
    layer: int | None,
    source: Source,
    shape: tuple[int, ...],
    rank: int,
    dtype: np.dtype,
) -> Iterator[np.ndarray]:
    """Yield one rank's part of an official tensor, of `shape` by its single axes, in row-major order."""
    for region in tiles(shape, tile_shape(shape)):
        bounds = dict(zip(rule.view, region, strict=True))
        if rule.split:
            first, part = rank * shape[rule.view.index(rule.split)], bounds[rule.split]
            bounds[rule.split] = slice(first + part.start, first + part.stop)
        index = tuple(bounds[axis] for axis in rule.ours)
        chunk = source.read(index) if layer is None else source.read((slice(layer, layer + 1), *index))[0]
        with np.errstate(over="ignore"):
            converted = chunk.astype(dtype)
        if np.isinf(converted).sum() > np.isinf(chunk).sum():
            largest = float(np.abs(chunk[np.isfinite(chunk)]).max())
            raise UserError(f"{name} has the value {largest:g}, too large for {dtype}: save as float32")
        yield converted.transpose([rule.ours.index(axis) for axis in rule.view])
