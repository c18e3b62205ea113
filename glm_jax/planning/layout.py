"""The partition of a run's state over its mesh, computed without a device."""

from __future__ import annotations

from collections.abc import Iterator

from glm_jax.config import Experiment
from glm_jax.engine import build
from glm_jax.parallel import partition
from glm_jax.planning.programs import pieces
from glm_jax.planning.tracing import state_shapes
from glm_jax.training.state import state_specs
from glm_jax.training.stretch import step_config


def table(config: Experiment) -> Iterator[str]:
    """Yield a line for every array of the state: path, shape in memory, PartitionSpec, bytes on each device.

    Raises:
        UserError: the mesh has a size of -1, which only devices can resolve, or it does not fit the model.
    """
    engine, mesh = build(config, pieces(config), abstract=True)
    cfg, sizes = step_config(config, engine), dict(mesh.shape)
    total = 0
    for part in partition.parts(state_shapes(cfg, mesh), state_specs(cfg, mesh), sizes):
        total += part.bytes
        yield f"{part.path:64} {'x'.join(map(str, part.shape)) or '-':24} {part.spec!s:64} {part.bytes:,}"
    yield f"{total:,} bytes of state on each of {mesh.size} devices; master params and moments are float32"
