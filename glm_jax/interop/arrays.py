"""Params between files and devices, whatever the files' layout: loaded onto meshes and written out in chunks."""

from __future__ import annotations

import collections
import functools
import math
from collections.abc import Iterator, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import UserError
from glm_jax.interop.layout import (
    SAT,
    SCALES,
    VALUES,
    ZEROS,
    Layout,
    Rule,
    axis_sizes,
    official_tensors,
    tile_shape,
    tiles,
)
from glm_jax.interop.sources import QuantizedSource, Repeated, Source, flatten, official, split, summary
from glm_jax.interop.torch_archive import DTYPES, TensorStream
from glm_jax.model import GLMConfig, shapes
from glm_jax.model.quantized import INPUTS, Quantized, is_quantized, split_groups
from glm_jax.model.transformer import Params
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ParamPath

Array = jax.Array
PARTS = {VALUES: jnp.int8, SCALES: jnp.float16, ZEROS: jnp.int32}  # dtypes of a quantised kernel's parts


def sources(params: Params) -> dict[ParamPath, Source]:
    """Return the arrays of params by path, to be written."""
    return dict(flatten(leaves(params).items()))


def load(parameters: Mapping[ParamPath, Source], shardings: Tree | None = None) -> Params:
    """Load params onto devices, reading of the files what this process's devices hold.

    Beyond the arrays themselves the host needs memory for one chunk.

    Args:
        parameters: an opened checkpoint.
        shardings: a jax Sharding for each array, nested as params, with those of the parts of a quantised kernel in a
            `Quantized`; None is the default device.

    Returns:
        float32 params as `glm_jax.model.init` gives them, with a `Quantized` in the place of each quantised kernel. Its
        scales are repeated where their sharding would not divide them.
    """
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    arrays: dict[ParamPath, object] = {}
    for param_path, parameter in parameters.items():
        sharding = (
            device if shardings is None else functools.reduce(lambda node, name: node[name], param_path, shardings)
        )
        if not isinstance(parameter, QuantizedSource):
            arrays[param_path] = fill(jnp.zeros(parameter.shape, jnp.float32, device=sharding), parameter)
            continue
        parts = {}
        for name, part in parameter.parts().items():
            of_part = device if shardings is None else getattr(sharding, name)
            if name != VALUES:
                part = Repeated(part, split_groups(part.shape, pieces(of_part, len(part.shape))))
            parts[name] = fill(jnp.zeros(part.shape, PARTS[name], device=of_part), part)
        arrays[param_path] = Quantized(parts[VALUES], parts[SCALES], parts.get(ZEROS), parameter.bits, parameter.axis)
    return nest(arrays)


def abstract(parameters: Mapping[ParamPath, Source]) -> Tree:
    """Return the shapes and dtypes of what `load` returns on one device."""
    shapes: dict[ParamPath, object] = {}
    for param_path, parameter in parameters.items():
        if isinstance(parameter, QuantizedSource):
            parts = {name: jax.ShapeDtypeStruct(part.shape, PARTS[name]) for name, part in parameter.parts().items()}
            shapes[param_path] = Quantized(
                parts[VALUES], parts[SCALES], parts.get(ZEROS), parameter.bits, parameter.axis
            )
        else:
            shapes[param_path] = jax.ShapeDtypeStruct(parameter.shape, jnp.float32)
    return nest(shapes)


def pieces(sharding: jax.sharding.Sharding, ndim: int) -> list[int]:
    """Return into how many pieces a sharding splits each of `ndim` axes."""
    if not isinstance(sharding, jax.NamedSharding):
        return [1] * ndim
    entries = [() if entry is None else (entry,) if isinstance(entry, str) else entry for entry in sharding.spec]
    counts = [math.prod(sharding.mesh.shape[name] for name in entry) for entry in entries]
    return counts + [1] * (ndim - len(counts))


@functools.partial(jax.jit, donate_argnums=0)
def _update(whole: Array, chunk: Array, start: list[Array]) -> Array:
    return jax.lax.dynamic_update_slice(whole, chunk, start)


def fill(array: Array, source: Source) -> Array:
    """Overwrite an array, chunk by chunk, with as much of `source` as fits; what lies beyond it stays.

    Args:
        array: of any dtype, on any mesh; it is donated. Devices with the same part share the reading.
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
            chunk = source.read(index, array.dtype)
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


def leaves(params: Params) -> Tree:
    """Undo `nest`: {path: leaf}. A quantised kernel is a leaf."""
    flat = jax.tree_util.tree_leaves_with_path(params, is_leaf=is_quantized)
    return {tuple(str(getattr(key, "key", key)) for key in keys): leaf for keys, leaf in flat}


def model_shapes(cfg: GLMConfig) -> dict[ParamPath, tuple[int, ...]]:
    """Return the shapes of the arrays of a model by path."""
    return {param_path: tuple(leaf.shape) for param_path, leaf in leaves(shapes(cfg)).items()}


def check_shapes(cfg: GLMConfig, shapes: Mapping[ParamPath, tuple[int, ...]], where: str) -> None:
    """Check the arrays of a params tree against cfg.

    Raises:
        UserError: one is missing, unknown or of another shape; the message starts with `where`.
    """
    wanted = model_shapes(cfg)
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

    Kernels that are quantised stay so in SAT's layout; Hugging Face's has only floats.

    Args:
        cfg: the model.
        sources: the arrays of params by path.
        dtype: of the tensors of floats, a key of `torch_archive.DTYPES`; scales are float16.
        layout, ranks, rank: the names of tensors, the number of tensor-parallel ranks and which of them.

    Raises:
        UserError: the shapes are not cfg's, or scales are not those that SAT has; while chunks are drawn, a value does
            not fit dtype.
    """
    check_shapes(cfg, {param_path: tuple(source.shape) for param_path, source in sources.items()}, "params")
    found = summary(sources) if layout == SAT else None
    if found:
        sources = split(official(sources, ranks))
    kinds = {VALUES: np.dtype(np.int8), SCALES: np.dtype(np.float16)}
    sizes, tensors = axis_sizes(cfg, ranks), {}
    for name, rule, layer in official_tensors(cfg, layout, found.bits if found else 0):
        kind = kinds.get(rule.path[-1] if rule.path[:-1] in INPUTS else "", DTYPES[dtype][1])
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
