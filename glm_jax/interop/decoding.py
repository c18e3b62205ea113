"""Weights on disk, read for decoding: onto any mesh, each device its own part."""

from __future__ import annotations

import functools
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.engine.bind import check_model
from glm_jax.engine.weights import DecodeConfig, Weights
from glm_jax.errors import UserError
from glm_jax.interop import arrays
from glm_jax.interop.arrays import PARTS
from glm_jax.interop.layout import VALUES
from glm_jax.interop.sources import QuantizedSource, Repeated, Source
from glm_jax.model import logical_axes, quantized
from glm_jax.model.quantized import Quantized
from glm_jax.parallel import partition
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ParamPath

Array = jax.Array


def read(cfg: DecodeConfig, mesh: jax.sharding.Mesh, parameters: Mapping[ParamPath, Source]) -> Weights:
    """Read weights in the dtype of the computation; quantised kernels stay so.

    Beyond the arrays themselves the host needs memory for one of them.

    Args:
        cfg: static.
        mesh: where to.
        parameters: an opened checkpoint, see `interop.weights`.

    Raises:
        UserError: the model does not fit the mesh.
    """
    check_model(cfg.model, mesh)
    axes = quantized.logical_axes(logical_axes(cfg.model), arrays.abstract(parameters))
    specs, held = partition.specs(axes), partition.layers_held(cfg.model.num_layers, mesh.shape["pipeline"])
    outer: dict[ParamPath, object] = {}
    layers: list[dict[ParamPath, object]] = [{} for _ in range(held)]
    for path, source in parameters.items():
        spec = functools.reduce(lambda node, name: node[name], path, specs)
        if path[0] != "blocks":
            outer[path] = _whole(source, cfg.compute, mesh, spec)
        else:
            for number, layer in enumerate(layers):
                layer[path[1:]] = _layer(source, cfg, mesh, spec, number, path)
    return Weights(arrays.nest(outer), tuple(map(arrays.nest, layers)))


def _whole(source: Source, dtype: str, mesh: jax.sharding.Mesh, spec: jax.P) -> Array:
    def region(index: tuple[slice, ...] | None) -> np.ndarray:
        return source.read(_bounds(index, source.shape), jnp.dtype(dtype))

    return jax.make_array_from_callback(source.shape, jax.NamedSharding(mesh, spec), region)


def _layer(
    source: Source, cfg: DecodeConfig, mesh: jax.sharding.Mesh, spec: Tree, number: int, path: ParamPath
) -> Array | Quantized:
    """Return the `number`-th layer of every stage: [P, ...]."""
    if not isinstance(source, QuantizedSource):
        return _part(source, cfg, jnp.dtype(cfg.compute), mesh, spec, number)
    parts: dict[str, Array] = {}
    for name, part in source.parts().items():
        part_spec = getattr(spec, name)
        sharding = jax.NamedSharding(mesh, part_spec)
        pieces = [1, *arrays.pieces(sharding, len(part.shape))[1:]]  # layers are whole
        if name != VALUES:
            part = Repeated(part, quantized.split_groups(part.shape, pieces))
        elif part.shape[source.axis] % pieces[source.axis]:
            raise UserError(f"{'.'.join(path)} has {source.bits} bits packed in {part.shape[source.axis]} bytes, which "
                            f"mesh.tensor={pieces[source.axis]} does not divide: choose fewer, or 8 bits")  # fmt: skip
        parts[name] = _part(part, cfg, jnp.dtype(PARTS[name]), mesh, part_spec, number)
    return Quantized(parts["values"], parts["scales"], parts.get("zeros"), source.bits, source.axis)


def _part(
    source: Source, cfg: DecodeConfig, dtype: np.dtype, mesh: jax.sharding.Mesh, spec: jax.P, number: int
) -> Array:
    stages = mesh.shape["pipeline"]
    held = partition.layers_held(cfg.model.num_layers, stages)
    shape = (stages, *source.shape[1:])

    def region(index: tuple[slice, ...] | None) -> np.ndarray:
        here, *inside = _bounds(index, shape)
        found = np.zeros([part.stop - part.start for part in (here, *inside)], dtype)
        for place, stage in enumerate(range(here.start, here.stop)):
            if (layer := stage * held + number) < cfg.model.num_layers:  # else the stage holds fewer layers
                found[place] = source.read((slice(layer, layer + 1), *inside), dtype)[0]
        return found

    return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, spec), region)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), shape, strict=True))
