"""How long a step takes, between two bounds, and what its devices send one another.

The bounds are rooflines (doi 10.1145/1498765.1498785). At the lower one every kernel is as fast as its products or its
memory traffic alone allow, and what devices send hides behind kernels. At the upper one nothing hides: each operation,
also an elementwise one, reads and writes memory, and products, memory and links take turns.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Mapping
from fractions import Fraction

from glm_jax.parallel import partition
from glm_jax.parallel.device_sheet import Device
from glm_jax.parallel.mesh import AXES
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import tracing
from glm_jax.planning.program import SLICES, UPDATES, VIEWS, Operation, Program, kernels
from glm_jax.planning.tracing import Mesh, Pass
from glm_jax.planning.work import Flops
from glm_jax.training.state import StepConfig


@dataclasses.dataclass(frozen=True)
class Speed:
    """A rate of training."""

    step_seconds: float
    tokens_per_second: float  # of all devices
    mfu: float  # share of the peak that the model's own operations take (PaLM, arXiv 2204.02311)
    hfu: float  # the same with what is computed again


@dataclasses.dataclass(frozen=True)
class Load:
    """What a device does in some part of a step."""

    kernels: float = 0.0  # seconds, each kernel as fast as products or memory allow
    operations: float = 0.0  # seconds, one operation after another, products and memory in turn
    flops: float = 0.0  # of the products that the trace shows
    sent: Mapping[str, float] = dataclasses.field(default_factory=dict)  # bytes, by mesh axes

    def times(self, count: float) -> Load:
        """Return the load of doing this `count` times."""
        sent = {axes: count * size for axes, size in self.sent.items()}
        return Load(count * self.kernels, count * self.operations, count * self.flops, sent)

    def __add__(self, other: Load) -> Load:
        """Return the load of doing both."""
        sent = Counter(self.sent) + Counter(other.sent)
        both = (self.kernels + other.kernels, self.operations + other.operations, self.flops + other.flops)
        return Load(*both, dict(sent))


def of_program(program: Program, device: Device, turns: int = 1) -> Load:
    """Return the load of a program; a loop that does not say how many turns it takes has `turns`."""
    total = Load()
    for one in program.operations:
        inside = turns if one.turns is None else one.turns
        for body in one.bodies:
            # in a loop over blocks of queries, the one over blocks of keys sees all of them at most
            total += of_program(body, device, inside).times(inside)
        if not one.bodies and one.kind not in VIEWS:
            seconds = one.flops / device.peak + _moved(one) / device.bandwidth
            total += Load(operations=seconds, flops=one.flops, sent=one.sent)
    for kernel in kernels(program)[0]:
        if not kernel.operation.bodies:
            total += Load(kernels=max(kernel.operation.flops / device.peak, kernel.moved / device.bandwidth))
    return total


def _moved(one: Operation) -> int:
    """Return the bytes that an operation reads and writes on its own."""
    if one.kind in UPDATES:
        return 3 * one.inputs[-1].size
    written = sum(value.size for value in one.outputs)
    if one.kind in ("broadcast_in_dim", "iota"):  # nobody writes these down
        return 0
    return 2 * written if one.kind in SLICES else written + sum(value.size for value in one.inputs)


def of_step(traced: Pass, cfg: StepConfig, mesh: Mesh, table: schedule.Schedule, device: Device) -> Load:
    """Return the load of a device in a whole step, of the stage with the most layers; no stage waits.

    The optimizer reads gradients, params and two moments, and writes the last three. XLA for CPUs takes what embedding
    and head do out of their loops of one turn or none, so that it is done in every tick.
    """
    layers = partition.layers_held(cfg.engine.model.num_layers, mesh.shape["pipeline"])
    of_model = table.ticks if tracing.platform(device) == "cpu" else table.microbatches
    blocks = [one for one in (traced.forward, traced.inputs, traced.backward) if one is not None]
    body = traced.tick.bodies[0]
    in_tick = of_program(body._replace(operations=[one for one in body.operations if not one.bodies]), device)
    outside = traced.program
    outside = outside._replace(operations=[one for one in outside.operations if one is not traced.tick])
    total = of_program(outside, device) + in_tick.times(table.ticks)
    for one in (one for one in body.operations if one.bodies):
        count = table.microbatches * layers if one in blocks else of_model
        total += of_program(one.bodies[0], device).times(count)
    params = sum(value.size for value in traced.program.outputs[: traced.params])
    seconds = 7 * params / device.bandwidth
    return total + Load(kernels=seconds, operations=seconds)


def span(axes: str, sizes: Mapping[str, int]) -> int:
    """Return how many neighbouring devices a group along these axes reaches over; the last axis lies closest."""
    first = min(AXES.index(axis) for axis in axes.split("+"))
    return math.prod(sizes[axis] for axis in AXES[first:])


def link_seconds(sent: Mapping[str, float], device: Device, sizes: Mapping[str, int]) -> dict[str, float]:
    """Return the time that a device sends along the mesh axes, inside its node or to others."""

    def rate(axes: str) -> float:
        inside = device.node is None or device.network is None or span(axes, sizes) <= device.node
        return device.link if inside or device.network is None else device.network

    return {axes: size / rate(axes) for axes, size in sent.items()}


def bracket(
    load: Load,
    flops: Flops,
    tokens: int,
    bubble: Fraction,
    device: Device,
    sizes: Mapping[str, int],
    *,
    fused: bool = False,
) -> tuple[Speed, Speed]:
    """Return the speed at the upper bound of a step's time, the slowest, and at the lower one.

    Args:
        load: of a step.
        flops: of a token.
        tokens: of a step.
        bubble: the share of a stage's time that is idle.
        device: of all.
        sizes: of the mesh's axes.
        fused: whether kernels do not show their products, so that `load` lacks them.
    """
    devices = math.prod(sizes.values())
    hidden = max(0.0, flops.hardware * tokens / devices - load.flops) / device.peak if fused else 0.0
    links = link_seconds(load.sent, device, sizes)
    busy = 1 / (1 - float(bubble))
    fastest = max((load.kernels + hidden) * busy, *links.values()) if links else (load.kernels + hidden) * busy
    slowest = (load.operations + hidden) * busy + sum(links.values())
    return at(slowest, flops, tokens, device, devices), at(fastest, flops, tokens, device, devices)


def at(seconds: float, flops: Flops, tokens: int, device: Device, devices: int) -> Speed:
    """Return the speed of a step of `tokens` that takes so many seconds, such as a measured one."""
    rate = tokens / seconds
    peak = device.peak * devices
    return Speed(seconds, rate, rate * flops.model / peak, rate * flops.hardware / peak)


def bubbles_by_microbatches(name: str, stages: int, counts: list[int]) -> dict[int, float]:
    """Return the bubble for each number of microbatches (paper, appendix B, equation 5)."""
    return {count: float(schedule.build(name, stages, count).bubble) for count in counts}


def bubbles_by_stages(name: str, devices: int, tensor: int, rows: int, layers: int) -> dict[int, float]:
    """Return the bubble for each number of stages of a fixed number of devices (paper, appendix B, equation 6).

    More stages leave fewer data-parallel replicas, and each has more microbatches of one row.

    Args:
        name: of the schedule.
        devices: in all.
        tensor: the mesh's axis.
        rows: of a global batch.
        layers: of the model, at most one a stage.
    """
    found = {}
    for stages in range(1, min(layers, devices // tensor) + 1):
        replicas, left = divmod(devices, stages * tensor)
        if not left and rows % replicas == 0:
            found[stages] = float(schedule.build(name, stages, rows // replicas).bubble)
    return found
