"""How a run's state lies on its mesh, computed without a device: what `config show --specs` lists and plans count."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

import jax

from glm_jax.config import Experiment
from glm_jax.engine import build
from glm_jax.parallel import partition
from glm_jax.planning.programs import pieces
from glm_jax.planning.tracing import Mesh, state_shapes
from glm_jax.training.state import StepConfig, state_specs, true_layers
from glm_jax.training.stretch import step_config

BASE = "base"  # the params that LoRA leaves alone; they are no part of the state that is saved


@dataclasses.dataclass(frozen=True)
class Placed:
    """One array of the state.

    Attributes:
        path: in the state, such as `params/embedding/word`.
        shape: the true one, as on disk.
        padding: of each dimension in memory, what is added to `shape` to fill the stages.
        spec: how it is split.
        bytes: on each device, with the padding.
    """

    path: str
    shape: tuple[int, ...]
    padding: tuple[int, ...]
    spec: jax.P
    bytes: int

    @property
    def size(self) -> str:
        """The shape as text, such as `(70+2)x12288`, where 2 layers are padding; `-` for a scalar."""
        sizes = zip(self.shape, self.padding, strict=True)
        return "x".join(f"({true}+{added})" if added else f"{true}" for true, added in sizes) or "-"


@dataclasses.dataclass(frozen=True)
class Layout:
    """A state on a mesh. All devices run one program and hold as much, whatever their stage.

    Attributes:
        mesh: sizes by axis.
        stages: the layers of each stage, without padding.
        arrays: of the state, and with LoRA of its base.
    """

    mesh: Mapping[str, int]
    stages: tuple[range, ...]
    arrays: tuple[Placed, ...]

    def bytes(self, *parts: str) -> int:
        """Return the bytes on each device, of everything or of the parts of these names, such as `params`."""
        return sum(one.bytes for one in self.arrays if not parts or one.path.partition("/")[0] in parts)


def layout(experiment: Experiment) -> Layout:
    """Return the layout of an experiment's state.

    Raises:
        UserError: the mesh has a size of -1, which only devices can resolve, or it does not fit the model.
    """
    engine, mesh = build(experiment, pieces(experiment), abstract=True)
    return of_step(step_config(experiment, engine), mesh)


def of_step(cfg: StepConfig, mesh: Mesh) -> Layout:
    """Return the layout of the state of a step, see `tracing.bind`."""
    layers, stages = cfg.engine.model.num_layers, mesh.shape["pipeline"]
    arrays = [*_arrays(cfg, mesh)]
    if cfg.lora is not None:
        base = _arrays(dataclasses.replace(cfg, lora=None), mesh)
        params = (one for one in base if one.path.startswith("params/"))
        arrays += [dataclasses.replace(one, path=one.path.replace("params", BASE, 1)) for one in params]
    return Layout(dict(mesh.shape), partition.stage_layers(layers, stages), tuple(arrays))


def _arrays(cfg: StepConfig, mesh: Mesh) -> Iterator[Placed]:
    padded = state_shapes(cfg, mesh)
    true = jax.tree.leaves(jax.eval_shape(lambda state: true_layers(cfg, state), padded))
    parts = partition.parts(padded, state_specs(cfg, mesh), dict(mesh.shape))
    for part, array in zip(parts, true, strict=True):
        padding = tuple(whole - size for whole, size in zip(part.shape, array.shape, strict=True))
        yield Placed(part.path, array.shape, padding, part.spec, part.bytes)


def table(found: Layout) -> Iterator[str]:
    """Yield a line for every array (path, shape, PartitionSpec, bytes a device), then what they come to."""
    for one in found.arrays:
        yield f"{one.path:64} {one.size:24} {one.spec!s:64} {one.bytes:,}"
    yield stages_line([*map(len, found.stages)])
    devices = math.prod(found.mesh.values())
    yield f"{found.bytes():,} bytes of state on each of {devices:,} devices; master params and moments are float32"


def stages_line(layers: Sequence[int]) -> str:
    """Return what `70 layers in 8 stages of 9, 2 places empty: stage 7 has 7` says, given the layers of each stage."""
    stages, room = len(layers), max(layers)
    line = f"{sum(layers)} layers in {stages} stage{'s' if stages > 1 else ''} of {room}"
    empty = stages * room - sum(layers)
    if not empty:
        return line
    short = ", ".join(f"stage {stage} has {held}" for stage, held in enumerate(layers) if held < room)
    return f"{line}, {empty} place{'s' if empty > 1 else ''} empty: {short}"
