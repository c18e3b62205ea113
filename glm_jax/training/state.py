"""TrainState: all that a run carries from step to step, on the mesh and on disk."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import model
from glm_jax.config.training import Lora, LossScaleConfig
from glm_jax.engine.bind import EngineConfig
from glm_jax.errors import UserError
from glm_jax.model import lora
from glm_jax.model.groups import Groups, of_params
from glm_jax.parallel import partition, processes
from glm_jax.training import optimizer, precision
from glm_jax.training.optimizer import Optimizer
from glm_jax.training.precision import LossScale
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import ADAPTERS, PARAMS

Array = jax.Array
Mesh = jax.sharding.Mesh
Items = dict[str, Tree]  # the trees of a checkpoint, by name


@dataclasses.dataclass(frozen=True)
class StepConfig:
    """Everything a step depends on besides its arrays and the mesh; hashable."""

    engine: EngineConfig
    optimizer: Optimizer
    loss_scale: LossScaleConfig | None  # None: the scale stays 1
    seed: int
    shrinks: bool = False  # whether `Controls.shrink` is used
    groups: Groups = Groups()
    lora: Lora | None = None  # None: the model's own params are trained


class TrainState(NamedTuple):
    """All that a run carries from step to step; params and moments are float32.

    `params` are trained: the model's, or with LoRA its adapters (lora.py), beside a base that never changes.
    In memory the layers are padded to fill the stages of the pipeline (`true_layers` undoes this for the disk), and
    params and moments are also split over `data` (ZeRO-1).
    """

    step: Array  # int32, optimizer steps taken
    samples: Array  # int32, rows seen, modulo 2**32; the run counts them as a whole number and decides by that
    params: Tree
    moments: Tree
    loss_scale: LossScale


def init_state(cfg: StepConfig, stages: int = 1, key: Array | None = None) -> TrainState:
    """Make the state before the first step, its layers padded to `stages`. By default `key` is made from the seed."""
    key = jax.random.key(cfg.seed) if key is None else key
    glm = cfg.engine.model
    params = model.init(glm, key) if cfg.lora is None else lora.init(glm, cfg.lora, key)
    params = partition.pad_layers(params, _param_axes(cfg), stages)
    moments = optimizer.transformation(cfg.optimizer, of_params(cfg.groups, glm, params)).init(params)
    return TrainState(jnp.int32(0), jnp.int32(0), params, moments, precision.initial_loss_scale(cfg.loss_scale))


def model_params(cfg: StepConfig, params: Tree, base: Tree) -> Tree:
    """Return the params of the model: those that are trained, or with LoRA the base, adapters merged into it."""
    return params if cfg.lora is None else lora.merge(base, params, cfg.lora.alpha / cfg.lora.rank)


def whole_params(cfg: StepConfig, params: Tree, base: Tree) -> Tree:
    """Return `model_params` without the layers that only fill up the stages."""
    glm = cfg.engine.model
    return partition.true_layers(model_params(cfg, params, base), model.logical_axes(glm), glm.num_layers)


def _param_axes(cfg: StepConfig) -> Tree:
    glm = cfg.engine.model
    return model.logical_axes(glm) if cfg.lora is None else lora.adapter_axes(glm, cfg.lora)


@functools.lru_cache(maxsize=4)  # a run asks for them many times
def _shapes(cfg: StepConfig) -> TrainState:
    """Return the shapes and dtypes of the state before the first step, its layers not padded."""
    return jax.eval_shape(lambda: init_state(cfg))


def _axes(cfg: StepConfig) -> TrainState:
    """Return the logical axes of every array of the state: a moment has those of its param, other arrays have none.

    A moment is recognised by its path, which ends like its param's, and by its shape. This finds the moments of adam,
    of lion, and of a transformation masked to some params. Anything else that an optimizer keeps is replicated.
    """
    shapes = _shapes(cfg)
    axes = jax.tree.leaves(_param_axes(cfg), is_leaf=lambda leaf: isinstance(leaf, tuple))
    leaves = jax.tree_util.tree_leaves_with_path(shapes.params)
    known = {(tuple(path), array.shape): names for (path, array), names in zip(leaves, axes, strict=True)}

    def axes_of(path: jax.tree_util.KeyPath, array: jax.ShapeDtypeStruct) -> tuple[str | None, ...]:
        ends = (known.get((tuple(path[start:]), array.shape)) for start in range(len(path)))
        return next((names for names in ends if names is not None), (None,) * array.ndim)

    return jax.tree_util.tree_map_with_path(axes_of, shapes)


def state_specs(cfg: StepConfig, mesh: Mesh) -> TrainState:
    """Return the PartitionSpec of every array of the state: moments are split like their params, scalars replicated."""
    return partition.state_specs(_axes(cfg), cfg.engine.model.hidden_size, mesh.shape["data"])


def true_layers(cfg: StepConfig, state: TrainState) -> TrainState:
    """Remove the layers that only fill up the stages."""
    return partition.true_layers(state, _axes(cfg), cfg.engine.model.num_layers)


def pad_layers(cfg: StepConfig, state: TrainState, stages: int) -> TrainState:
    """Undo `true_layers` for a pipeline of `stages`."""
    return partition.pad_layers(state, _axes(cfg), stages)


def create_state(cfg: StepConfig, mesh: Mesh, load: Callable[[Tree], Tree] = lambda params: params) -> TrainState:
    """Make the first state on the mesh; each device makes its own part.

    Without LoRA `load` may replace the params, padded as they are in memory.
    """
    shardings = partition.shardings(mesh, state_specs(cfg, mesh))
    state = jax.jit(lambda: init_state(cfg, mesh.shape["pipeline"]), out_shardings=shardings)()
    return state._replace(params=load(state.params)) if cfg.lora is None else state


def create_base(cfg: StepConfig, mesh: Mesh, load: Callable[[Tree], Tree] = lambda params: params) -> Tree:
    """Make the model's params that adapters are added to, as `create_state` does; without LoRA there are none: ()."""
    if cfg.lora is None:
        return ()
    whole = dataclasses.replace(cfg, lora=None)
    shardings = partition.shardings(mesh, state_specs(whole, mesh).params)
    return load(jax.jit(lambda: init_state(whole, mesh.shape["pipeline"]).params, out_shardings=shardings)())


def at_step(mesh: Mesh, state: TrainState, step: int, samples: int, loss_scale: LossScale | None = None) -> TrainState:
    """Return the state with new counters and, if given, a new loss scale, which keeps its count of skipped steps."""
    counters = (np.int32(step), np.int64(samples).astype(np.int32), loss_scale or state.loss_scale)
    step_, samples_, scale = jax.device_put(jax.device_get(counters), jax.NamedSharding(mesh, jax.P()))
    return state._replace(step=step_, samples=samples_, loss_scale=scale._replace(skipped=state.loss_scale.skipped))


def _is_padded(cfg: StepConfig, mesh: Mesh) -> bool:
    return cfg.engine.model.num_layers % mesh.shape["pipeline"] != 0


def _disk_shardings(cfg: StepConfig, mesh: Mesh) -> TrainState:
    """Return the shardings of a state on its way to the disk and back.

    Where stages are padded, `pipeline` cannot split the true layers: it splits another dimension of their arrays.
    """
    specs = state_specs(cfg, mesh)
    if _is_padded(cfg, mesh):
        specs = partition.moved("pipeline", specs, _shapes(cfg), mesh.shape)
    return partition.shardings(mesh, specs)


def _items(cfg: StepConfig, state: TrainState) -> Items:
    rest = {name: value for name, value in state._asdict().items() if name != "params"}
    return {_trained(cfg): state.params, "training": rest}


def _trained(cfg: StepConfig) -> str:
    """Return the name of the item that holds `params`."""
    return PARAMS if cfg.lora is None else ADAPTERS


def to_disk(cfg: StepConfig, mesh: Mesh, state: TrainState) -> Items:
    """Return the trees of a checkpoint; every mesh has the same layout.

    They are `params`, or `adapters` alone with LoRA, whose base lies where the run began; and `training` with the rest.
    """
    return _items(cfg, _cut(cfg, mesh)(state) if _is_padded(cfg, mesh) else state)


@functools.lru_cache(maxsize=4)
def _cut(cfg: StepConfig, mesh: Mesh) -> Callable[[TrainState], TrainState]:
    """Return `true_layers` for `_disk_shardings`, compiled once for all saves of a run."""
    cut = jax.jit(lambda state: true_layers(cfg, state), out_shardings=_disk_shardings(cfg, mesh))
    return processes.compiled_together(cut)


def disk_targets(cfg: StepConfig, mesh: Mesh) -> Items:
    """Return the shapes, dtypes and shardings of the trees that `from_disk` takes.

    Raises:
        UserError: the layers are padded to the stages, and the optimizer keeps arrays that cannot be cut to the layers.
    """
    shapes = _shapes(cfg)
    if _is_padded(cfg, mesh):
        cut = jax.eval_shape(lambda: true_layers(cfg, init_state(cfg, mesh.shape["pipeline"])))
        if [array.shape for array in jax.tree.leaves(cut)] != [array.shape for array in jax.tree.leaves(shapes)]:
            raise UserError(
                f"the optimizer keeps arrays whose shapes differ from the params: choose a mesh.pipeline that divides "
                f"model.num_layers ({cfg.engine.model.num_layers})"
            )
    target = jax.tree.map(
        lambda shape, sharding: jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding),
        shapes,
        _disk_shardings(cfg, mesh),
    )
    return _items(cfg, target)


def from_disk(cfg: StepConfig, mesh: Mesh, items: Mapping[str, Tree]) -> TrainState:
    """Rebuild the state from the trees of `to_disk`, padded to this mesh's stages."""
    state = TrainState(params=items[_trained(cfg)], **items["training"])
    if _is_padded(cfg, mesh):
        placed = partition.shardings(mesh, state_specs(cfg, mesh))
        stages = mesh.shape["pipeline"]
        pad = jax.jit(lambda state: pad_layers(cfg, state, stages), out_shardings=placed)
        state = processes.compiled_together(pad)(state)
    return state


def describe_parts(state: TrainState, base: Tree) -> str:
    """Say how much of the model is trained, and what a device holds of params and moments."""
    trained, kept = (sum(leaf.size for leaf in jax.tree.leaves(tree)) for tree in (state.params, base))
    held = [
        sum(leaf.addressable_shards[0].data.nbytes for leaf in jax.tree.leaves(tree)) / 1e6
        for tree in ((state.params, base), state.moments)
    ]
    return (
        f"adapters: {trained:,} parameters are trained, {kept:,} stay as they are; "
        f"a device holds {held[0]:,.1f} MB of both and {held[1]:,.1f} MB of moments"
    )
