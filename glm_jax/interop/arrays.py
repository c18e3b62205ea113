"""Params between files and devices, whatever the files' layout: loaded onto meshes and written out in chunks."""

from __future__ import annotations

import collections
import functools
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Protocol, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import UserError
from glm_jax.interop.layout import SAT, Layout, Rule, axis_sizes, official_tensors, rules, tile_shape, tiles
from glm_jax.interop.shards import Parameter
from glm_jax.interop.torch_archive import DTYPES, TensorStream
from glm_jax.model import GLMConfig
from glm_jax.model.transformer import Params
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ParamPath

Array = jax.Array


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


S = TypeVar("S", bound=_Shaped)


def load(parameters: Mapping[ParamPath, Parameter], shardings: Tree | None = None) -> Params:
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
        arrays[param_path] = _place(parameter, sharding)
    return nest(arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: Array, chunk: Array, start: list[Array]) -> Array:
    return jax.lax.dynamic_update_slice(whole, chunk, start)


def _place(parameter: Parameter, sharding: jax.sharding.Sharding) -> Array:
    """Make one float32 array of `sharding`, chunk by chunk; devices with the same part share the reading."""
    owners = collections.defaultdict(list)
    for device, index in sharding.addressable_devices_indices_map(parameter.shape).items():
        bounds = zip(index or (), parameter.shape, strict=True)
        owners[tuple(part.indices(size)[:2] for part, size in bounds)].append(device)
    shards = []
    for bounds, devices in owners.items():
        shape = tuple(stop - start for start, stop in bounds)
        tile = tile_shape(shape)
        parts = [None if tile == shape else jnp.zeros(shape, jnp.float32, device=device) for device in devices]
        for region in tiles(shape, tile):
            index = tuple(slice(b[0] + r.start, b[0] + r.stop) for b, r in zip(bounds, region, strict=True))
            chunk = parameter.read(index, np.dtype(np.float32))
            for place, device in enumerate(devices):
                moved, whole = jax.device_put(chunk, device), parts[place]
                start = [np.int32(part.start) for part in region]
                parts[place] = moved if whole is None else _update(whole, moved, start)
            jax.block_until_ready(parts)  # else the chunks pile up behind the transfers
        shards += parts
    return jax.make_array_from_single_device_arrays(parameter.shape, sharding, shards)


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


def read_array(source: Array, index: tuple[slice | int, ...]) -> np.ndarray:
    """Read a region of an array, as `streams` asks of its sources."""
    return np.asarray(source[index])


def check_free(path: str | Path) -> Path:
    """Check that a folder can be written at `path`.

    Raises:
        UserError: something is there that is not an empty folder.
    """
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists already: choose another directory or remove it")
    return root


def check_shapes(cfg: GLMConfig, shapes: Mapping[ParamPath, tuple[int, ...]], where: str) -> None:
    """Check the arrays of a params tree against cfg.

    Raises:
        UserError: one is missing, unknown or of another shape; the message starts with `where`.
    """
    wanted = {rule.path: rule.our_shape(axis_sizes(cfg)) for rule in rules(cfg)}
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
    sources: Mapping[ParamPath, S],
    read: Callable[[S, tuple[slice | int, ...]], np.ndarray],
    dtype: str,
    *,
    layout: Layout = SAT,
    ranks: int = 1,
    rank: int = 0,
) -> dict[str, TensorStream]:
    """Return one rank's official tensors, whose chunks are read and turned when they are written.

    Args:
        cfg: the model.
        sources: for each array of params something that has its shape.
        read: `read(source, index)` returns a region; an index has an integer for the layer of a block's array.
        dtype: of the tensors, a key of `torch_archive.DTYPES`.
        layout, ranks, rank: the names of tensors, the number of tensor-parallel ranks and which of them.

    Raises:
        UserError: the shapes are not cfg's; while chunks are drawn, a value does not fit dtype.
    """
    check_shapes(cfg, {param_path: tuple(source.shape) for param_path, source in sources.items()}, "params")
    kind, sizes, tensors = DTYPES[dtype][1], axis_sizes(cfg), {}
    for name, rule, layer in official_tensors(cfg, layout):
        source = functools.partial(read, sources[rule.path])
        chunks = _chunks(name, rule, layer, source, rule.view_shape(sizes, ranks), rank, kind)
        tensors[name] = TensorStream(rule.torch_shape(sizes, ranks), kind, chunks)
    return tensors


def _chunks(
    name: str,
    rule: Rule,
    layer: int | None,
    read: Callable[[tuple[slice | int, ...]], np.ndarray],
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
        chunk = read(index if layer is None else (layer, *index))
        with np.errstate(over="ignore"):
            converted = chunk.astype(dtype)
        if np.isinf(converted).sum() > np.isinf(chunk).sum():
            largest = float(np.abs(chunk[np.isfinite(chunk)]).max())
            raise UserError(f"{name} has the value {largest:g}, too large for {dtype}: save as float32")
        yield converted.transpose([rule.ours.index(axis) for axis in rule.view])
