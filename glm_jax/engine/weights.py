"""The weights of a model as decoding holds them: every layer in arrays of its own, never split over `data`."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.engine.bind import check_model
from glm_jax.model import GLMConfig, logical_axes
from glm_jax.model.parts import path_of
from glm_jax.model.parts import shapes as shapes_of
from glm_jax.parallel import partition
from glm_jax.types import Tree

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DecodeConfig:
    """Everything that decoding depends on besides arrays and the mesh; hashable."""

    model: GLMConfig
    num_tokens: int  # real rows of the padded vocabulary; scores give the rest no probability
    compute: str = "float32"  # dtype of weights, activations and the cache


class Weights(NamedTuple):
    """Weights on a mesh."""

    outer: Tree  # of embedding and head
    layers: tuple[Tree, ...]  # Q trees of arrays [P, ...]: the q-th layer of every stage


def specs(cfg: GLMConfig, stages: int) -> Weights:
    """Return the PartitionSpecs of the weights; the axis P of layers takes the place of L."""
    whole = partition.specs(logical_axes(cfg))
    blocks = whole.pop("blocks")
    return Weights(whole, (blocks,) * partition.layers_held(cfg.num_layers, stages))


def place(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Tree) -> Weights:
    """Place params, wherever they are, on a mesh in the dtype of the computation.

    Args:
        cfg: static.
        mesh: see below.
        params: as `model.init` returns them; blocks may be padded (`partition.pad_layers`).

    Raises:
        UserError: the model does not fit the mesh.
    """
    check_model(cfg.model, mesh)
    return _placer(cfg, mesh)(params)


@functools.lru_cache(maxsize=8)
def _placer(cfg: DecodeConfig, mesh: jax.sharding.Mesh) -> jax.stages.Wrapped:
    stages = mesh.shape["pipeline"]
    held = partition.layers_held(cfg.model.num_layers, stages)

    def split(params: Tree) -> Weights:
        cast = jax.tree.map(lambda array: array.astype(cfg.compute), params)
        blocks = partition.pad_layers(cast, logical_axes(cfg.model), stages)["blocks"]
        by_stage = jax.tree.map(lambda array: array.reshape(stages, held, *array.shape[1:]), blocks)
        layers = tuple(jax.tree.map(lambda array, q=q: array[:, q], by_stage) for q in range(held))
        return Weights({name: cast[name] for name in cast if name != "blocks"}, layers)

    return jax.jit(split, out_shardings=partition.shardings(mesh, specs(cfg.model, stages)))


class Stored(Protocol):
    """An array on disk, which is read region by region."""

    def read(self, index: tuple[slice, ...], dtype: np.dtype, /) -> np.ndarray:
        """Read a region, one slice an axis."""
        ...


def read(cfg: DecodeConfig, mesh: jax.sharding.Mesh, stored: Mapping[tuple[str, ...], Stored]) -> Weights:
    """Read weights onto a mesh in the dtype of the computation, each device its own part.

    Args:
        cfg: static.
        mesh: see below.
        stored: the arrays of params by path, those of blocks [L, ...].

    Raises:
        UserError: the model does not fit the mesh.
    """
    check_model(cfg.model, mesh)
    stages, dtype = mesh.shape["pipeline"], jnp.dtype(cfg.compute)
    held = partition.layers_held(cfg.model.num_layers, stages)

    def whole(path: tuple[str, ...], array: jax.ShapeDtypeStruct, spec: jax.P) -> Array:
        def region(index: tuple[slice, ...] | None) -> np.ndarray:
            return stored[path].read(_bounds(index, array.shape), dtype)

        return jax.make_array_from_callback(array.shape, jax.NamedSharding(mesh, spec), region)

    def layer(path: tuple[str, ...], array: jax.ShapeDtypeStruct, spec: jax.P, number: int) -> Array:
        shape = (stages, *array.shape[1:])

        def region(index: tuple[slice, ...] | None) -> np.ndarray:
            here, *inside = _bounds(index, shape)
            parts = np.zeros([part.stop - part.start for part in (here, *inside)], dtype)
            for place, stage in enumerate(range(here.start, here.stop)):
                if (which := stage * held + number) < cfg.model.num_layers:
                    parts[place] = stored[path].read((slice(which, which + 1), *inside), dtype)[0]
            return parts

        return jax.make_array_from_callback(shape, jax.NamedSharding(mesh, spec), region)

    def build(make: Callable[..., Array], tree: Tree, tree_specs: Tree, *more: int) -> Tree:
        return jax.tree_util.tree_map_with_path(
            lambda keys, array, spec: make(path_of(keys), array, spec, *more), tree, tree_specs
        )

    shapes, layout = shapes_of(cfg.model), specs(cfg.model, stages)
    outer = build(whole, {name: shapes[name] for name in layout.outer}, layout.outer)
    blocks = {"blocks": shapes["blocks"]}
    layers = tuple(build(layer, blocks, {"blocks": layout.layers[number]}, number)["blocks"] for number in range(held))
    return Weights(outer, layers)


def _bounds(index: tuple[slice, ...] | None, shape: tuple[int, ...]) -> tuple[slice, ...]:
    return tuple(slice(*part.indices(size)[:2]) for part, size in zip(index or (), shape, strict=True))
