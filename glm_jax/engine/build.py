"""Turns an experiment into its model on a mesh."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import NamedTuple, cast

import jax

from glm_jax.config import Experiment
from glm_jax.config.data import OBJECTIVES
from glm_jax.engine import bind, stash
from glm_jax.engine.bind import EngineConfig
from glm_jax.errors import UserError
from glm_jax.model import attention_cores
from glm_jax.parallel.devices import device_memory
from glm_jax.parallel.mesh import AXES, REST, Device
from glm_jax.parallel.mesh import build as build_mesh


class Engine(NamedTuple):
    """A model bound to a mesh: what the passes over a batch take."""

    config: EngineConfig
    mesh: jax.sharding.Mesh


def build(
    experiment: Experiment,
    pieces: int = 1,
    devices: Sequence[Device] | None = None,
    *,
    abstract: bool = False,
    memory: int | None = None,
) -> Engine:
    """Build an experiment's mesh and engine config, and check that model and batch fit the mesh.

    Args:
        experiment: the sections model, mesh, pipeline, train and data are used.
        pieces: of the tokenizer. To check an experiment that has no tokenizer yet, use 1: what divides the smallest
            padded vocabulary divides every other.
        devices: jax devices; by default all of them.
        abstract: use an AbstractMesh, without devices, to find shapes and shardings or to compile ahead of time.
        memory: bytes of a device, by which `pipeline.stash=auto` chooses; by default those of this process's devices.

    Raises:
        UserError: there are too few devices, a size does not divide, or an abstract mesh has a size of -1.
    """
    sizes = experiment.mesh.sizes()
    mesh = abstract_mesh(sizes) if abstract else build_mesh(sizes, devices)
    platform = "" if abstract else attention_cores.platform(mesh.devices.flat[0])
    train, glm, asked = experiment.train, experiment.glm(pieces), experiment.pipeline.stash
    config = EngineConfig(
        model=glm,
        num_tokens=pieces,
        objectives=len(OBJECTIVES),
        compute=train.precision,
        schedule=experiment.pipeline.schedule,
        keep="layer" if asked == "auto" else asked,
        normalization=train.loss_normalization,
        z_loss=train.z_loss,
        shrink_logits=train.embedding_shrink.logits,
        attention=attention_cores.choose(glm, platform, experiment.data.seq_length, train.precision),
        attention_scores=train.log_attention_scores,
        zero=experiment.mesh.zero,
    )
    rows, length = train.global_batch // train.microbatches, experiment.data.seq_length
    bind.check(config, mesh, train.global_batch, train.microbatches, length)
    if asked == "auto" and not abstract:
        keep = stash.choose(config, mesh, rows, length, device_memory() if memory is None else memory)
        config = dataclasses.replace(config, keep=keep)
    return Engine(config, mesh)


def abstract_mesh(sizes: Mapping[str, int]) -> jax.sharding.Mesh:
    """Return a mesh without devices.

    Raises:
        UserError: a size depends on the devices.
    """
    if REST in sizes.values():
        raise UserError(f"a mesh size of {REST} depends on the devices: give a number, such as --config.mesh.data=1")
    shape, types = tuple(sizes[axis] for axis in AXES), (jax.sharding.AxisType.Auto,) * len(AXES)
    mesh = jax.sharding.AbstractMesh(shape, AXES, axis_types=types)
    return cast(jax.sharding.Mesh, mesh)  # it has the shape and the axes, which is all that specs need
