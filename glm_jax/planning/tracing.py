"""The pass over a batch that an experiment takes, traced from shapes for one device of its mesh."""

from __future__ import annotations

import dataclasses
import functools
from typing import Literal, NamedTuple

import jax

from glm_jax.config import Experiment
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import build, passes, stash
from glm_jax.model import attention_cores
from glm_jax.parallel.device_sheet import Device
from glm_jax.planning.program import Operation, Program, Target, read
from glm_jax.training.state import StepConfig, TrainState, init_state
from glm_jax.training.stretch import step_config
from glm_jax.types import Tree

Mesh = jax.sharding.Mesh
Platform = Literal["cpu", "gpu", "tpu"]
CPU = "cpu"  # the name of a device that stands for this machine's processor


class Pass(NamedTuple):
    """The traced pass, and its loops by what they do in a tick."""

    program: Program  # its first outputs are the gradients, a device's shards
    params: int  # how many arrays they are
    tick: Operation  # the loop over ticks
    forward: Operation  # over a stage's blocks
    head: Operation
    inputs: Operation | None  # over a stage's blocks again, if the stash has the stage's input alone
    backward: Operation


def platform(device: Device) -> Platform:
    """Return the platform of a device of the sheet.

    That of a GPU has no fused attention, because jax asks the machine for cuDNN when it traces; a plan for a GPU counts
    the scores that cuDNN, where it is used (`attention_cores.choose`), would not keep.
    """
    if device.name == CPU:
        return "cpu"
    return "tpu" if device.topology else "gpu"


def bind(experiment: Experiment, device: Device, pieces: int) -> tuple[StepConfig, Mesh]:
    """Bind an experiment to an abstract mesh, with the attention and the stash that it would have on this device.

    Raises:
        UserError: the model or the batch does not fit the mesh, or the mesh has a size of -1.
    """
    engine, mesh = build(experiment, pieces, abstract=True)
    length, train = experiment.data.seq_length, experiment.train
    core = attention_cores.choose(engine.model, platform(device), length, engine.compute)
    engine = dataclasses.replace(engine, attention=core)
    if experiment.pipeline.stash == "auto":
        rows = train.global_batch // train.microbatches
        engine = dataclasses.replace(engine, keep=stash.choose(engine, mesh, rows, length, device.memory))
    return step_config(experiment, engine), mesh


def batch_shapes(experiment: Experiment) -> Rows[jax.ShapeDtypeStruct]:
    """Return the shapes of a full global batch, arrays [M, B/M, ...]."""
    train, two_streams = experiment.train, experiment.model.position == "learned_2d"
    shape = (train.microbatches, train.global_batch // train.microbatches, experiment.data.seq_length)
    return Rows.abstract(shape, two_streams=two_streams)


def model_shapes(cfg: StepConfig, mesh: Mesh) -> Tree:
    """Return the shapes of the model's params, padded to the stages; with LoRA those that adapters are merged into."""
    return state_shapes(dataclasses.replace(cfg, lora=None), mesh).params


@functools.lru_cache(maxsize=8)  # a plan asks for them many times
def state_shapes(cfg: StepConfig, mesh: Mesh) -> TrainState:
    """Return the shapes of the state, padded to the stages."""
    return jax.eval_shape(lambda: init_state(cfg, mesh.shape["pipeline"]))


def trace(experiment: Experiment, device: Device, cfg: StepConfig, mesh: Mesh) -> Pass:
    """Trace the gradients of a full batch, as a step computes them on one device."""
    glm, scalar = cfg.engine.model, jax.ShapeDtypeStruct((), "float32")
    drops = glm.attention_dropout or glm.hidden_dropout
    key = jax.eval_shape(lambda: jax.random.key(0)) if drops else None
    shrink = scalar if cfg.shrinks else None

    def gradients(params: Tree, rows: Rows[jax.Array], extras: Tree) -> passes.Gradients:
        return passes.value_and_grad(cfg.engine, mesh, params, rows, *extras)

    extras = (key, shrink, scalar)
    params = model_shapes(cfg, mesh)
    closed = jax.make_jaxpr(gradients)(params, batch_shapes(experiment), extras)
    (mapped,) = (one for one in closed.jaxpr.eqns if one.primitive.name == "shard_map")
    target = Target(dict(mesh.shape), cpu=platform(device) == "cpu")
    program = read(mapped.params["jaxpr"], target)
    (tick,) = (one for one in program.operations if one.kind == "scan")
    working = [one for one in tick.bodies[0].operations if one.kind == "while" and multiplies(one)]
    forward, head, *again, backward = working
    return Pass(program, len(jax.tree.leaves(params)), tick, forward, head, again[0] if again else None, backward)


def multiplies(one: Operation) -> bool:
    """Whether an operation is a product or a fused kernel of products, or has one inside."""
    inside = (inner for body in one.bodies for inner in body.operations)
    return one.flops > 0 or one.kind in ("pallas_call",) or "attention" in one.kind or any(map(multiplies, inside))
