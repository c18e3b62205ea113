"""Ways to run an experiment on a number of devices, ranked by the estimated time of a step.

A way is a mesh, the number of microbatches, a schedule and a stash. The global batch stays what it is. A way that the
model or the batch does not allow is left out, and so is one that cannot be better than another; one that cannot fit by
its largest arrays alone is not traced. All others are estimated as `estimate.plan` does, in several processes.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence

import jax.numpy as jnp

from glm_jax.config import Experiment, with_changes
from glm_jax.data.corpora.build import WorkerDied, Workers
from glm_jax.engine import build, stash
from glm_jax.engine.bind import EngineConfig
from glm_jax.errors import UserError, WorkFailed
from glm_jax.parallel import mesh as meshes
from glm_jax.parallel import partition
from glm_jax.parallel.device_sheet import Device
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import estimate, speed, tracing, work
from glm_jax.planning.estimate import Plan
from glm_jax.types import Json

STASHES = ("layer", "stage", "products", "all")
# why a way is not ranked
CONFIG = "have rows a microbatch that the config does not allow"
SAME = "are the same as another"
WORSE = "are GPipe with no less memory and time than 1F1B"
SLOW = "take longer than the config's own, by their products and what layers send alone"
FLOOR = "do not fit by params, gradients and what they keep alone"
LARGE = "do not fit as estimated"


@dataclasses.dataclass(frozen=True)
class Way:
    """One way to run an experiment."""

    data: int
    pipeline: int
    tensor: int
    microbatches: int
    schedule: str
    stash: str

    def __str__(self) -> str:
        """Return the way as people read it."""
        microbatches = "1 microbatch" if self.microbatches == 1 else f"{self.microbatches} microbatches"
        return (
            f"data={self.data} x pipeline={self.pipeline} x tensor={self.tensor}, {microbatches}, "
            f"{self.schedule}, stash {self.stash}"
        )

    def changes(self) -> dict[str, object]:
        """Return the values of the config by dotted key."""
        return {
            "mesh.data": self.data, "mesh.pipeline": self.pipeline, "mesh.tensor": self.tensor,
            "train.microbatches": self.microbatches,
            "pipeline.schedule": self.schedule, "pipeline.stash": self.stash,
        }  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Choice:
    """A way and its estimate."""

    way: Way
    plan: Plan

    @property
    def seconds(self) -> float:
        """The seconds of a step if nothing overlaps, by which choices are ranked."""
        return self.plan.slowest.step_seconds

    def to_json(self) -> Json:
        """Return the choice as plain values, for JSON."""
        return {"changes": self.way.changes(), "estimate": self.plan.to_json()}


@dataclasses.dataclass(frozen=True)
class Ranking:
    """What a search found.

    Attributes:
        considered: how many ways there are.
        left_out: how many of them are not ranked, by reason.
        choices: the others, the fastest first.
        own: the config's own way; None if its mesh is of another number of devices.
    """

    considered: int
    left_out: Mapping[str, int]
    choices: tuple[Choice, ...]
    own: Choice | None

    @property
    def place(self) -> int | None:
        """The place of the config's own way, from 1, also if it does not fit; None if it is not of so many devices."""
        if self.own is None:
            return None
        return 1 + sum(_order(choice) < _order(self.own) for choice in self.choices)

    def to_json(self) -> Json:
        """Return the ranking as plain values, for JSON."""
        return {
            "considered": self.considered,
            "left_out": dict(self.left_out),
            "choices": [choice.to_json() for choice in self.choices],
            "own": self.own.to_json() if self.own else None,
            "place": self.place,
        }


def own(experiment: Experiment, devices: int, device: Device, pieces: int) -> Way | None:
    """Return an experiment's own way; None if its mesh is of another number of devices.

    Raises:
        UserError: its mesh does not fit the model or the batch.
    """
    sizes = meshes.resolve(experiment.mesh.sizes(), devices)
    if math.prod(sizes.values()) != devices:
        return None
    settled = with_changes(experiment, {f"mesh.{axis}": size for axis, size in sizes.items()})
    keep = tracing.bind(settled, device, pieces)[0].engine.keep
    return Way(**sizes, microbatches=settled.train.microbatches, schedule=settled.pipeline.schedule, stash=keep)


def ways(experiment: Experiment, devices: int, pieces: int, mine: Way | None = None) -> tuple[list[Way], Counter[str]]:
    """Return the ways to run an experiment, and how many others there are, by the reason why they are left out.

    What the model or the batch does not divide over a mesh is no way. `mine`, the config's own, is never left out.
    """
    found, left = list[Way](), Counter[str]()
    batch, names = experiment.train.global_batch, tuple(schedule.SCHEDULES)
    # the batch ramp is a matter of rows a microbatch, not of the mesh
    bare = with_changes(experiment, {"train.batch_ramp": ()})
    allowed = {count: _valid(experiment, {"train.microbatches": count}) for count in _divisors(batch)}
    for data, pipeline, tensor in _meshes(devices):
        sizes = {"mesh.data": data, "mesh.pipeline": pipeline, "mesh.tensor": tensor}
        counts = [count for count in allowed if batch // count % data == 0]
        for keep in STASHES if counts else ():
            if not _valid(bare, {**sizes, "pipeline.stash": keep, "train.microbatches": counts[0]}, pieces):
                continue
            one_layer = partition.layers_held(experiment.model.num_layers, pipeline) == 1
            for count, name in itertools.product(counts, names):
                way = Way(data, pipeline, tensor, count, name, keep)
                reason = CONFIG if not allowed[count] else SAME if one_layer and keep == "stage" else _pointless(way)
                if reason is None or way == mine:
                    found.append(way)
                else:
                    left[reason] += 1
    return found, left


def rank(
    experiment: Experiment, devices: int, device: Device, pieces: int, memory: int, *, top: int, processes: int = 1
) -> Ranking:
    """Rank the ways to run an experiment that fit, as estimated.

    Ways that surely take longer than the config's own are estimated only if fewer than `top` others fit.

    Args:
        experiment: resolved; a size of its mesh may be -1.
        devices: how many.
        device: of what kind.
        pieces: of the tokenizer.
        memory: bytes of a device that arrays may take.
        top: how many are wanted.
        processes: that estimate at a time.

    Raises:
        UserError: the config's own mesh does not fit its model or batch.
        WorkFailed: a process was killed.
    """
    mine = own(experiment, devices, device, pieces)
    found, left = ways(experiment, devices, pieces, mine)
    considered = len(found) + left.total()
    bounds = Bounds(experiment, device, pieces)
    small = [way for way in found if way != mine and bounds.memory(way) <= memory]
    left[FLOOR] = len(found) - len(small) - (mine in found)
    with Workers(min(processes, len(small) + 1)) as workers:

        def estimated(chosen: Sequence[Way]) -> list[Choice]:
            jobs = [(with_changes(experiment, way.changes()), device, pieces) for way in chosen]
            plans = workers.run("estimating", _plan, jobs, [1] * len(jobs), unit="ways")
            return [Choice(way, plan) for way, plan in zip(chosen, plans, strict=True)]

        try:
            first = estimated([mine])[0] if mine else None
            longest = first.seconds if first else math.inf
            sooner = [way for way in small if bounds.seconds(way) < longest]
            choices = estimated(sooner)
            slower = [way for way in small if way not in set(sooner)]
            if sum(choice.plan.fits(memory) for choice in choices) < top:
                choices += estimated(slower)
                slower = []
        except WorkerDied:
            raise WorkFailed("a process was killed: this machine may lack memory for the search") from None
    left[SLOW] = len(slower)
    choices += [first] if first else []
    fitting = [choice for choice in choices if choice.plan.fits(memory)]
    left[LARGE] = len(choices) - len(fitting)
    return Ranking(considered, +left, tuple(sorted(fitting, key=_order)), first)


class Bounds:
    """What ways need at least, known without a trace."""

    def __init__(self, experiment: Experiment, device: Device, pieces: int) -> None:
        """Take what `rank` takes."""
        self._experiment, self._device, self._pieces = experiment, device, pieces
        self._batch, self._length = experiment.train.global_batch, experiment.data.seq_length
        self._engines = dict[str, EngineConfig]()

    def memory(self, way: Way) -> int:
        """Return bytes that a device needs: state, weights, gradients and what it keeps for backward slots.

        Everything is taken to be split evenly. With LoRA, whose state is small, it is what backward slots need.
        """
        cfg = self._engine(way)
        parts = work.parameters(cfg.model)
        blocks = sum(size for name, size in parts.items() if name.startswith("blocks/"))
        outer = sum(parts.values()) - blocks
        split, item = way.pipeline * way.tensor, jnp.dtype(cfg.compute).itemsize
        cast = 0 if way.data == 1 and cfg.compute == "float32" else item
        of_blocks = 4 * blocks // (split * way.data) if cfg.zero == 3 else (cast + 4) * blocks // split
        state = 12 * (blocks + outer) // (split * way.data) + of_blocks + (cast + 4) * outer // split
        layers = 1 if way.stash == "stage" else partition.layers_held(cfg.model.num_layers, way.pipeline)
        kept = self._rows(way) * _ring(way) * layers * _row_bytes(cfg, self._length) // way.tensor
        return kept + (0 if self._experiment.train.lora.rank else state)

    def seconds(self, way: Way) -> float:
        """Return seconds of a step in which nothing overlaps: products without recomputation, and what layers send."""
        cfg, device = self._engine(way), self._device
        flops = work.flops(cfg, self._length).model * self._batch * self._length
        busy = 1 + (way.pipeline - 1) / way.microbatches
        products = flops / (way.data * way.pipeline * way.tensor) / device.peak * busy
        layers = way.microbatches * cfg.model.num_layers // way.pipeline
        row = self._length * cfg.model.hidden_size * jnp.dtype(cfg.compute).itemsize
        # in and out of two sublayers, forward and backward
        sent = 8 * layers * self._rows(way) * row * (1 - 1 / way.tensor)
        sizes = {"data": way.data, "pipeline": way.pipeline, "tensor": way.tensor}
        return products + speed.link_seconds({"tensor": sent}, device, sizes)["tensor"]

    def _rows(self, way: Way) -> int:
        """Return the rows of a microbatch on a device."""
        return self._batch // way.microbatches // way.data

    def _engine(self, way: Way) -> EngineConfig:
        """Return the engine's config; what is read of it depends on the stash alone."""
        if way.stash not in self._engines:
            changed = with_changes(self._experiment, way.changes())
            self._engines[way.stash] = tracing.bind(changed, self._device, self._pieces)[0].engine
        return self._engines[way.stash]


@functools.lru_cache(maxsize=16)
def _row_bytes(cfg: EngineConfig, length: int) -> int:
    """Return the bytes that are kept of a layer for a row, if no axis of the mesh splits them."""
    if cfg.keep in ("layer", "stage"):
        return length * cfg.model.hidden_size * jnp.dtype(cfg.compute).itemsize
    return stash.layer_bytes(cfg, 1, length)


def _ring(way: Way) -> int:
    """Return the stash slots of a stage; that of 1f1b does not depend on the microbatches."""
    return schedule.build(way.schedule, way.pipeline, 1 if way.schedule == "1f1b" else way.microbatches).ring


def _plan(job: tuple[Experiment, Device, int]) -> Plan:
    return estimate.plan(*job)


def _order(choice: Choice) -> tuple[float, int, tuple[object, ...]]:
    return choice.seconds, choice.plan.memory.total, dataclasses.astuple(choice.way)


def _pointless(way: Way) -> str | None:
    """Return why a way cannot be better than another, if so."""
    if way.schedule != "gpipe":
        return None
    if way.pipeline == 1:
        return SAME
    # it has more ticks and the same bubble; its ring is smaller if there are few microbatches
    return WORSE if way.microbatches >= _ring(dataclasses.replace(way, schedule="1f1b")) else None


def _divisors(count: int) -> list[int]:
    return [divisor for divisor in range(1, count + 1) if count % divisor == 0]


def _meshes(devices: int) -> Iterator[tuple[int, int, int]]:
    for pipeline in _divisors(devices):
        for tensor in _divisors(devices // pipeline):
            yield devices // pipeline // tensor, pipeline, tensor


def _valid(experiment: Experiment, changes: Mapping[str, object], pieces: int | None = None) -> bool:
    """Whether the config allows changes; if `pieces` is given, whether they fit their mesh, too."""
    try:
        changed = with_changes(experiment, changes)
        if pieces is not None:
            build(changed, pieces, abstract=True)
    except UserError:
        return False
    return True
