"""The programs of a run and of inference, lowered from shapes alone for devices that need not exist."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Literal

import jax
from jax.typing import DTypeLike

from glm_jax.config import Experiment
from glm_jax.data.tokenizers.load import read
from glm_jax.engine import build, decode
from glm_jax.engine.weights import DecodeConfig
from glm_jax.inference.quantize import scheme
from glm_jax.inference.sampling import Sampler
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel import partition
from glm_jax.planning import decode_shapes
from glm_jax.planning.tracing import batch_shapes, state_shapes
from glm_jax.training.state import StepConfig, disk_targets, from_disk, state_specs, to_disk
from glm_jax.training.step import Controls, compile_steps
from glm_jax.training.stretch import step_config
from glm_jax.types import Tree

# `step` is a training step; `save` and `restore` are what a state goes through on its way to the disk and back;
# `decode` generates tokens, after `prefill` has read their contexts
Name = Literal["step", "save", "restore", "decode", "prefill"]
Weights = Literal["float32", "float16", "bfloat16", "int8", "int4"]
BITS = {"int8": 8, "int4": 4}


@dataclasses.dataclass(frozen=True)
class Inference:
    """What `decode` and `prefill` are compiled for.

    Attributes:
        weights: the dtype of computation, weights and cache; or the integers that hold the kernels of blocks, for a
            computation in half precision.
        room: tokens of a row, context and what is generated.
        rows: that each stage of each member of `data` works on at a time.
        group: the inputs that share a scale, see `inference.quantize`.
    """

    weights: Weights
    room: int
    rows: int = 1
    group: int | None = None


def pieces(experiment: Experiment) -> int:
    """Return the pieces of an experiment's tokenizer; before there is one, those that it will be made with.

    Raises:
        UserError: the tokenizer's file cannot be read.
    """
    tokenizer = experiment.data.tokenizer
    return read(tokenizer.path, pinned=tokenizer.pinned).size if tokenizer.path else tokenizer.vocab_size


def lower(
    name: Name,
    experiment: Experiment,
    devices: Sequence[meshes.Device],
    memory: int | None = None,
    inference: Inference | None = None,
) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    """Lower a program, and return the mesh that it is for.

    Args:
        name: of the program.
        experiment: resolved.
        devices: from `targets.devices`.
        memory: bytes of a device, by which `pipeline.stash=auto` chooses; None: an even share of this machine's.
        inference: for `decode` and `prefill`.

    Raises:
        UserError: the model or the batch does not fit the mesh.
    """
    if name in ("decode", "prefill"):
        assert inference is not None
        return _lower_inference(name, experiment, devices, inference)
    engine, mesh = build(experiment, pieces(experiment), devices, memory=memory)
    cfg = step_config(experiment, engine)
    if name == "restore":
        return jax.jit(lambda items: from_disk(cfg, mesh, items)).lower(disk_targets(cfg, mesh)), mesh
    state = _state(cfg, mesh)
    if name == "save":
        return jax.jit(lambda state: to_disk(cfg, mesh, state)).lower(state), mesh
    base = () if cfg.lora is None else _state(dataclasses.replace(cfg, lora=None), mesh).params
    train, _ = compile_steps(cfg, mesh)
    return train.lower(state, _rows(experiment, mesh), _controls(mesh), base), mesh


def _described(shape: tuple[int, ...], dtype: DTypeLike, mesh: jax.sharding.Mesh, spec: jax.P) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape, dtype, sharding=jax.NamedSharding(mesh, spec))


def _state(cfg: StepConfig, mesh: jax.sharding.Mesh) -> Tree:
    """Return the shapes of the state on the mesh."""
    shapes, specs = state_shapes(cfg, mesh), state_specs(cfg, mesh)
    return jax.tree.map(lambda leaf, spec: _described(leaf.shape, leaf.dtype, mesh, spec), shapes, specs)


def _rows(experiment: Experiment, mesh: jax.sharding.Mesh) -> Tree:
    """Return the shapes of a global batch [M, B/M, S] on the mesh."""
    return jax.tree.map(
        lambda array: _described(array.shape, array.dtype, mesh, partition.batch_spec(array.ndim)),
        batch_shapes(experiment),
    )


def _controls(mesh: jax.sharding.Mesh) -> Tree:
    number: Tree = _described((), "float32", mesh, jax.P())
    requests: Tree = _described((mesh.size,), "int32", mesh, jax.P(mesh.axis_names))
    return Controls(number, number, requests)


def half(*, tpu: bool) -> Weights:
    """Return the half precision in which a platform computes with quantised weights."""
    return "bfloat16" if tpu else "float16"


def bind_inference(
    experiment: Experiment, inference: Inference, pieces: int, *, tpu: bool
) -> tuple[DecodeConfig, Tree]:
    """Return what decoding depends on, and the shapes of the params.

    Raises:
        UserError: the model cannot be quantised so.
    """
    bits = BITS.get(inference.weights)
    cfg = DecodeConfig(experiment.glm(pieces), pieces, half(tpu=tpu) if bits else inference.weights)
    return cfg, decode_shapes.param_shapes(cfg.model, scheme(bits, inference.group) if bits else None)


def _lower_inference(
    name: Name, experiment: Experiment, devices: Sequence[meshes.Device], inference: Inference
) -> tuple[jax.stages.Lowered, jax.sharding.Mesh]:
    mesh = meshes.build(experiment.mesh.sizes(), devices)
    cfg, params = bind_inference(experiment, inference, pieces(experiment), tpu=devices[0].platform == "tpu")
    rows = inference.rows * mesh.shape["data"]
    batch = decode_shapes.Batch(mesh.shape["pipeline"], rows, inference.room)
    if name == "prefill":
        return decode.prefill.lower(cfg, mesh, *decode_shapes.prefill_arguments(cfg, mesh, params, batch)), mesh
    arguments = decode_shapes.decode_arguments(cfg, mesh, params, batch)
    return decode.decode.lower(cfg, mesh, Sampler(), *arguments), mesh
