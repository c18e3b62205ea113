"""Official checkpoints, as SwissArmyTransformer (SAT) writes them, to and from params.

shards.py has the directory, layout.py the table of names and shapes. Nothing here needs torch; tensors pass in chunks.
"""

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
from glm_jax.interop.layout import (
    Rule,
    axis_sizes,
    check_ranks,
    official_tensors,
    rules,
    tile_shape,
    tiles,
)
from glm_jax.interop.shards import RANK_FILE, Parameter, gather, infer_config, open_parameters, open_ranks
from glm_jax.interop.torch_archive import TensorStream, write_archive
from glm_jax.model import GLMConfig
from glm_jax.model.transformer import Params
from glm_jax.storage.files import atomic_directory
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ParamPath

Array = jax.Array


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


S = TypeVar("S", bound=_Shaped)


def load(path: str | Path, cfg: GLMConfig) -> Params:
    """Load an official checkpoint onto the default device.

    Args:
        path: the directory with `latest`; any number of tensor-parallel ranks.
        cfg: the model that it holds.

    Returns:
        float32 params as `glm_jax.model.init` gives them.

    Raises:
        UserError: a missing or damaged file, a tensor that is missing, unknown or of another shape than cfg's.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    return load_sharded(path, cfg, nest({rule.path: device for rule in rules(cfg)}))


def load_sharded(path: str | Path, cfg: GLMConfig, shardings: Tree) -> Params:
    """Load an official checkpoint onto a mesh, reading of the files what this process's devices hold.

    Beyond the arrays themselves the host needs memory for one chunk.

    Args:
        path, cfg: as in `load`.
        shardings: a jax Sharding for each array, nested as params.

    Raises:
        UserError: as in `load`.
    """
    arrays = {}
    for param_path, parameter in open_parameters(path, cfg).items():
        sharding = shardings
        for name in param_path:
            sharding = sharding[name]
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


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read an official checkpoint as it is: official names to arrays in the files' dtype, merged to one rank.

    Rotary tables (`inv_freq`) are left out.

    Raises:
        UserError: as in `load`.
    """
    ranks = open_ranks(path)
    cfg = infer_config(ranks)
    sizes = axis_sizes(cfg)
    parameters = gather(ranks, cfg)
    tensors = {}
    for name, rule, layer in official_tensors(cfg):
        parameter = parameters[rule.path]
        bounds = [slice(0, size) for size in parameter.shape]
        if layer is not None:
            bounds[0] = slice(layer, layer + 1)
        ours = parameter.read(tuple(bounds)).reshape([sizes[axis] for axis in rule.ours])
        view = ours.transpose([rule.ours.index(axis) for axis in rule.view])
        tensors[name] = np.ascontiguousarray(view).reshape(rule.torch_shape(sizes))
    return tensors


def nest(leaves: Mapping[ParamPath, object]) -> Tree:
    """Turn {path: leaf} into nested dicts."""
    tree: Tree = {}
    for (*parents, last), leaf in leaves.items():
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


def save(
    path: str | Path,
    cfg: GLMConfig,
    params: Params,
    *,
    tensor_parallel: int,
    iteration: int,
    dtype: str = "float32",
) -> None:
    """Write params as an official checkpoint, which appears whole or not at all.

    Args:
        path: a directory that does not exist yet (or is empty).
        cfg: the model.
        params: as `glm_jax.model.init` gives them.
        tensor_parallel: the number of rank files.
        iteration: the number that `latest` names.
        dtype: "float32" or "float16".

    Raises:
        UserError: the path is taken, params do not fit cfg, the ranks do not divide it, or a value does not fit dtype.
    """
    sources = {}
    for keys, leaf in jax.tree_util.tree_flatten_with_path(params)[0]:
        sources[tuple(str(getattr(key, "key", key)) for key in keys)] = leaf
    write(path, cfg, sources, lambda source, index: np.asarray(source[index]), tensor_parallel, iteration, dtype)


def write(
    path: str | Path,
    cfg: GLMConfig,
    sources: Mapping[ParamPath, S],
    read: Callable[[S, tuple[slice | int, ...]], np.ndarray],
    tensor_parallel: int,
    iteration: int,
    dtype: str,
) -> None:
    """Do the work of `save` for anything that has shapes and from which `read(source, index)` gets regions."""
    root = Path(path)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise UserError(f"{root} exists already: choose another directory or remove it")
    if dtype not in ("float32", "float16"):
        raise UserError(f"dtype is {dtype!r}, it must be float32 or float16")
    if iteration < 0:
        raise UserError(f"iteration is {iteration}, it must not be negative")
    check_ranks(cfg, tensor_parallel, root)
    check_shapes(cfg, {param_path: tuple(source.shape) for param_path, source in sources.items()}, "params")
    sizes = axis_sizes(cfg)
    with atomic_directory(root) as directory:
        (directory / "latest").write_text(str(iteration), "ascii")
        (directory / str(iteration)).mkdir()
        for rank in range(tensor_parallel):
            streams = {}
            for name, rule, layer in official_tensors(cfg):
                source = functools.partial(read, sources[rule.path])
                chunks = _chunks(name, rule, layer, source, rule.view_shape(sizes, tensor_parallel), rank, dtype)
                streams[name] = TensorStream(rule.torch_shape(sizes, tensor_parallel), np.dtype(dtype), chunks)
            write_archive(directory / str(iteration) / RANK_FILE.format(rank), "module", streams)


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


def _chunks(
    name: str,
    rule: Rule,
    layer: int | None,
    read: Callable[[tuple[slice | int, ...]], np.ndarray],
    shape: tuple[int, ...],
    rank: int,
    dtype: str,
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
