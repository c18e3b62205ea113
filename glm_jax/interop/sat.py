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

from glm_jax.config.fields import build
from glm_jax.errors import UserError
from glm_jax.interop import describe
from glm_jax.interop.layout import (
    Rule,
    axis_sizes,
    check_ranks,
    official_tensors,
    rules,
    tile_shape,
    tiles,
)
from glm_jax.interop.shards import RANK_FILE, Rank, gather, open_parameters, open_ranks
from glm_jax.interop.torch_archive import TensorStream, write_archive
from glm_jax.model import GLMConfig, init
from glm_jax.model.transformer import Params
from glm_jax.storage.files import atomic_directory, check_absent
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import Index, ParamPath

Array = jax.Array


class _Shaped(Protocol):
    @property
    def shape(self) -> tuple[int, ...]: ...


class _Readable(_Shaped, Protocol):
    def read(self, index: Index, dtype: np.dtype | None = None) -> np.ndarray: ...


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
        arrays[param_path] = fill(jnp.zeros(parameter.shape, jnp.float32, device=sharding), parameter)
    return nest(arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: Array, chunk: Array, start: list[Array]) -> Array:
    return jax.lax.dynamic_update_slice(whole, chunk, start)


def fill(array: Array, source: _Readable) -> Array:
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


def read_tensors(path: str | Path) -> dict[str, np.ndarray]:
    """Read an official checkpoint as it is: official names to arrays in the files' dtype, merged to one rank.

    Rotary tables (`inv_freq`) are left out.

    Raises:
        UserError: as in `load`.
    """
    ranks = open_ranks(path)
    cfg = _merged(ranks)
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


def _merged(ranks: list[Rank]) -> GLMConfig:
    """Return a config under which the ranks merge as they must; any count of heads that they divide does."""
    file, tensors = ranks[0]
    facts = describe.shapes(file, tensors, len(ranks))
    values: dict[str, object] = {key: fact.default for key, fact in facts.items()}
    values |= {"num_heads": len(ranks), "norm": values["norm"] or "deepnorm"}
    if values["position"] != "learned_2d":
        values["position"] = "alibi"  # rotary positions would need an even width of a head
    return build(GLMConfig, values, f"{file}: the shapes do not fit one another: ")


def nest(leaves: Mapping[ParamPath, object]) -> Tree:
    """Turn {path: leaf} into nested dicts."""
    tree: Tree = {}
    for (*parents, last), leaf in leaves.items():
        functools.reduce(lambda node, name: node.setdefault(name, {}), parents, tree)[last] = leaf
    return tree


def leaves(tree: Tree) -> dict[ParamPath, Tree]:
    """Undo `nest`."""
    flat = jax.tree_util.tree_leaves_with_path(tree)
    return {tuple(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in flat}


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
    write(path, cfg, leaves(params), lambda source, index: np.asarray(source[index]), tensor_parallel, iteration, dtype)


def write(
    path: str | Path,
    cfg: GLMConfig,
    sources: Mapping[ParamPath, S],
    read: Callable[[S, Index], np.ndarray],
    tensor_parallel: int,
    iteration: int,
    dtype: str,
) -> None:
    """Do the work of `save` for anything that has shapes and from which `read(source, index)` gets regions."""
    root = Path(path)
    check_absent(root)
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


def _chunks(
    name: str,
    rule: Rule,
    layer: int | None,
    read: Callable[[Index], np.ndarray],
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
        chunk = read(index) if layer is None else read((slice(layer, layer + 1), *index))[0]
        with np.errstate(over="ignore"):
            converted = chunk.astype(dtype)
        if np.isinf(converted).sum() > np.isinf(chunk).sum():
            largest = float(np.abs(chunk[np.isfinite(chunk)]).max())
            raise UserError(f"{name} has the value {largest:g}, too large for {dtype}: save as float32")
        yield converted.transpose([rule.ours.index(axis) for axis in rule.view])
