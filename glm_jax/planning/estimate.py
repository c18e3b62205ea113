"""An estimate of a run from its experiment alone, in a second or two: nothing is compiled, and no device is needed.

`plan` gives parameters, work, memory, traffic, speed and cost. Counts and memory come from the true step, traced from
shapes (tracing.py); speed is a bracket between two rooflines (speed.py).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from pathlib import Path

from glm_jax.config import Experiment
from glm_jax.parallel import device_sheet, partition
from glm_jax.parallel.device_sheet import Device
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import budget, speed, tracing, work
from glm_jax.planning.budget import Checkpoint
from glm_jax.planning.memory import Memory, memory
from glm_jax.planning.speed import Speed
from glm_jax.planning.work import Flops
from glm_jax.types import Json

# stands for the processor of whoever plans, whose rates nobody knows
PROCESSOR = Device("cpu", (), 1e11, 8 << 30, 1e10, 1e10, "no data sheet: only counts and memory are read")


def processor(*sheets: Path) -> Device:
    """Return the processor of whoever plans: the entry `cpu` of their sheets, or one whose rates are not known."""
    found = [known[tracing.CPU] for path in sheets if tracing.CPU in (known := device_sheet.sheet(path))]
    return found[-1] if found else PROCESSOR


@dataclasses.dataclass(frozen=True)
class Cost:
    """A whole run at one speed; energy and carbon are None for a device whose power is unknown."""

    days: float
    kilowatt_hours: float | None
    carbon_kilograms: float | None


@dataclasses.dataclass(frozen=True)
class Plan:
    """An estimate; bytes and seconds are of one device or one step unless noted."""

    device: str
    known_rates: bool  # of the device; without them neither speed nor cost can be known
    devices: int
    mesh: Mapping[str, int]
    schedule: str
    stash: str  # `pipeline.stash`, decided if it is auto
    layers: tuple[int, ...]  # of each stage, without padding
    attention: str  # the core that this device would have
    parameters: Mapping[str, int]  # by part of the model
    total_parameters: int
    flops: Flops  # of a token
    memory: Memory
    bubble: float  # the share of a stage's time that is idle
    device_flops: float  # of the products outside fused kernels, on a device of the stage with the most layers, a step
    sent: Mapping[str, int]  # bytes that a device sends in a step, by mesh axes
    slowest: Speed  # nothing overlaps
    fastest: Speed  # everything does
    steps: int
    tokens: int  # row tokens of the run
    slowest_run: Cost
    fastest_run: Cost
    checkpoint: Checkpoint  # of the whole model

    def fits(self, memory: float) -> bool:
        """Whether a step takes at most so many bytes of a device."""
        return self.memory.total <= memory

    def to_json(self) -> Json:
        """Return the plan as plain values, for JSON; None for speeds that cannot be known."""
        values = dataclasses.asdict(self)
        if not self.known_rates:
            values |= dict.fromkeys(("slowest", "fastest", "slowest_run", "fastest_run"))
        return values


def plan(experiment: Experiment, device: Device, pieces: int) -> Plan:
    """Estimate an experiment on its own mesh of one kind of device.

    Args:
        experiment: resolved; each size of its mesh is given.
        device: from the sheet of devices. One named `cpu` stands for a processor.
        pieces: of the tokenizer; the padded vocabulary follows from it and `model.vocab_size`.

    Raises:
        UserError: the model or the batch does not fit the mesh, or the mesh has a size of -1.
    """
    cfg, mesh = tracing.bind(experiment, device, pieces)
    traced = tracing.trace(experiment, device, cfg, mesh)
    sizes, engine, train = dict(mesh.shape), cfg.engine, experiment.train
    devices, length = math.prod(sizes.values()), experiment.data.seq_length
    table = schedule.build(engine.schedule, sizes["pipeline"], train.microbatches)
    parts, flops = work.parameters(engine.model), work.flops(engine, length)
    load = speed.of_step(traced, cfg, mesh, table, device)
    batch, fused = train.global_batch * length, engine.attention not in ("reference", "blockwise")
    slowest, fastest = speed.bracket(load, flops, batch, table.bubble, device, sizes, fused=fused)
    tokens = budget.tokens_of(experiment)
    return Plan(
        device=device.name,
        known_rates=device != PROCESSOR,
        devices=devices,
        mesh=sizes,
        schedule=engine.schedule,
        stash=engine.keep,
        layers=tuple(map(len, partition.stage_layers(engine.model.num_layers, sizes["pipeline"]))),
        attention=engine.attention,
        parameters=parts,
        total_parameters=sum(parts.values()),
        flops=flops,
        memory=memory(experiment, cfg, mesh, traced),
        bubble=float(table.bubble),
        device_flops=load.flops,
        sent={axes: round(size) for axes, size in load.sent.items()},
        slowest=slowest,
        fastest=fastest,
        steps=train.steps,
        tokens=tokens,
        slowest_run=cost(tokens, slowest.tokens_per_second, device, devices),
        fastest_run=cost(tokens, fastest.tokens_per_second, device, devices),
        checkpoint=budget.checkpoint(cfg, devices, device.node),
    )


def cost(tokens: float, tokens_per_second: float, device: Device, devices: int) -> Cost:
    """Return what a number of tokens costs at a rate of all devices, estimated or measured."""
    days = budget.days_for(tokens, tokens_per_second)
    if device.watts is None:
        return Cost(days, None, None)
    return Cost(days, *budget.energy(devices, device.watts, days))
