"""What lies where: the partition of a run's state over its mesh, worked out without a device."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import jax

from glm_jax.config import Experiment
from glm_jax.engine import passes
from glm_jax.errors import UserError
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel import partition
from glm_jax.training.segment import step_config
from glm_jax.training.state import init_state, state_specs


def table(config: Experiment) -> Iterator[str]:
    """Yield a line for every array of the state: path, shape in memory, PartitionSpec, bytes on each device.

    Raises:
        UserError: the mesh has a size of -1, which only devices can resolve, or does not fit the model.
    """
    sizes = config.mesh.sizes()
    if meshes.REST in sizes.values():
        raise UserError(
            f"a mesh size of {meshes.REST} depends on the devices: give a number, such as --config.mesh.data=1"
        )
    sizes = meshes.resolve(sizes, math.prod(sizes.values()))
    mesh: Any = jax.sharding.AbstractMesh(tuple(sizes[axis] for axis in meshes.AXES), meshes.AXES)
    length, train = config.data.seq_length, config.train
    glm = config.glm(config.data.tokenizer.vocab_size)
    cfg = step_config(config, glm, glm.vocab_size)
    passes.check(cfg.engine, mesh, train.global_batch, train.microbatches, length)
    shapes = jax.eval_shape(lambda: init_state(cfg, sizes["pipeline"]))
    total = 0
    for part in partition.parts(shapes, state_specs(cfg, mesh), sizes):
        total += part.bytes
        yield f"{part.path:64} {'x'.join(map(str, part.shape)) or '-':24} {part.spec!s:64} {part.bytes:,}"
    yield f"{total:,} bytes of state on each of {mesh.size} devices; master params and moments are float32"
