"""What generation takes on a mesh of one kind of device: memory, tokens a second. Nothing is compiled.

Prefill and decoding are traced from shapes, as the training step is (tracing.py), and read for one device. Their speed
is a bracket: at the lower bound of a tick's time every weight of a stage and the cache of a group are read once, and
products, memory and links are all at work at once. At the upper one kernels take turns, dequantised kernels are written
and read again, each kernel and each hop of a message has its latency, and links wait for all of them.
"""

from __future__ import annotations

import dataclasses
import inspect
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from typing import Literal, NamedTuple

import jax

from glm_jax.config import Experiment
from glm_jax.engine import decode
from glm_jax.engine.bind import check_model
from glm_jax.engine.build import abstract_mesh
from glm_jax.engine.weights import DecodeConfig, shapes, specs
from glm_jax.inference.sampling import Sampler
from glm_jax.model import attention_cores
from glm_jax.parallel import partition
from glm_jax.parallel.device_sheet import Device
from glm_jax.planning import decode_shapes, speed, tracing
from glm_jax.planning.allocation import peak_bytes
from glm_jax.planning.decode_shapes import Batch
from glm_jax.planning.estimate import PROCESSOR
from glm_jax.planning.program import ALL_REDUCES, Kernel, Operation, Program, Target, kernels, read
from glm_jax.planning.programs import Inference, bind_inference
from glm_jax.types import Json, Tree

Name = Literal["prefill", "decode"]
PARTS = ("values", "scales", "zeros")  # of a quantised kernel
LATENCY = 5e-6  # seconds that a kernel and a hop of a message take at least, if nothing hides them: an assumption


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device, of prefill or decoding, whichever takes more. Buffers of communication are not included."""

    weights: int  # with scales of quantised ones
    cache: int  # keys and values of all groups
    work: int  # whatever else: inputs, activations, scores, a kernel that is dequantised, logits
    total: int


@dataclasses.dataclass(frozen=True)
class Rate:
    """How fast text is generated, with a group of rows in every stage."""

    context_seconds: float  # to read the contexts of all rows, each of which takes all the room
    tick_seconds: float  # in which one group gets a token
    tokens_per_second: float  # of all rows
    tokens_per_row: float  # a second


@dataclasses.dataclass(frozen=True)
class Plan:
    """An estimate of generation."""

    inference: Inference
    compute: str  # the dtype of activations and the cache
    mesh: Mapping[str, int]
    devices: int
    rows: int  # on the whole mesh at a time
    memory: Memory
    slowest: Rate | None  # nothing overlaps; None if the rates of the device are unknown
    fastest: Rate | None  # everything does

    def to_json(self) -> Json:
        """Return the plan as plain values."""
        return dataclasses.asdict(self)


class Bound(NamedTuple):
    """A model of an experiment for inference, on an abstract mesh."""

    cfg: DecodeConfig
    mesh: tracing.Mesh
    params: Tree  # shapes
    batch: Batch
    cpu: bool


class Load(NamedTuple):
    """What a device does in a part of a program."""

    flops: float = 0.0
    moved: float = 0.0  # bytes that kernels read and write
    latencies: float = 0.0  # kernels, and hops of messages
    sent: Mapping[str, float] = {}  # bytes, by mesh axes


def bind(experiment: Experiment, inference: Inference, device: Device, pieces: int) -> Bound:
    """Bind an experiment's model to its mesh, whose sizes are all given.

    Raises:
        UserError: the model does not fit the mesh, it cannot be quantised so, or the mesh has a size of -1.
    """
    mesh, on = abstract_mesh(experiment.mesh.sizes()), tracing.platform(device)
    cfg, params = bind_inference(experiment, inference, pieces, tpu=on == "tpu")
    check_model(cfg.model, mesh)
    core = attention_cores.choose(cfg.model, on, inference.room, cfg.compute, forward_only=True)
    batch = Batch(mesh.shape["pipeline"], inference.rows * mesh.shape["data"], inference.room)
    return Bound(dataclasses.replace(cfg, attention=core), mesh, params, batch, on == "cpu")


def plan(experiment: Experiment, inference: Inference, device: Device, pieces: int) -> Plan:
    """Estimate generation on an experiment's mesh.

    Args:
        experiment: resolved; each size of its mesh is given.
        inference: the weights, and the rows.
        device: from a sheet of devices, or `estimate.PROCESSOR`, whose rates nobody knows.
        pieces: of the tokenizer.

    Raises:
        UserError: see `bind`.
    """
    bound = bind(experiment, inference, device, pieces)
    prefill, decoding = trace("prefill", bound), trace("decode", bound)
    held, kept = weight_bytes(bound), cache_bytes(bound)
    weights = held.outer + held.layers
    total = max(peak("prefill", prefill, bound), peak("decode", decoding, bound))
    sizes = dict(bound.mesh.shape)
    slowest, fastest = (None, None) if device == PROCESSOR else bracket(bound, prefill, decoding, device)
    return Plan(
        inference=inference,
        compute=bound.cfg.compute,
        mesh=sizes,
        devices=math.prod(sizes.values()),
        rows=bound.batch.groups * bound.batch.rows,
        memory=Memory(weights, kept, total - weights - kept, total),
        slowest=slowest,
        fastest=fastest,
    )


class Held(NamedTuple):
    """Bytes of weights on a device."""

    outer: int  # embedding and head
    layers: int
    plain: int  # of those of layers, what is not quantised


def weight_bytes(bound: Bound) -> Held:
    """Return the bytes of a device's weights, of the stage with the most layers."""
    found, sizes = shapes(bound.cfg, bound.mesh, bound.params), dict(bound.mesh.shape)
    named = specs(bound.cfg.model, found)
    layers = list(partition.parts(found.layers, named.layers, sizes))
    plain = sum(part.bytes for part in layers if not part.path.endswith(PARTS))
    outer = sum(part.bytes for part in partition.parts(found.outer, named.outer, sizes))
    return Held(outer, sum(part.bytes for part in layers), plain)


def cache_bytes(bound: Bound) -> int:
    """Return the bytes of a device's keys and values."""
    glm, sizes, batch = bound.cfg.model, bound.mesh.shape, bound.batch
    rows = batch.groups * batch.rows // sizes["data"]
    layers = partition.layers_held(glm.num_layers, sizes["pipeline"])
    numbers = 2 * layers * rows * batch.room * glm.num_heads // sizes["tensor"] * glm.head_dim
    return numbers * jax.numpy.dtype(bound.cfg.compute).itemsize


def trace(name: Name, bound: Bound) -> Program:
    """Trace prefill or decoding, and return the program of one device."""
    cfg, mesh, params, batch, cpu = bound
    if name == "prefill":
        arguments = decode_shapes.prefill_arguments(cfg, mesh, params, batch)
        closed = jax.make_jaxpr(lambda *given: inspect.unwrap(decode.prefill)(cfg, mesh, *given))(*arguments)
    else:
        arguments = decode_shapes.decode_arguments(cfg, mesh, params, batch)
        closed = jax.make_jaxpr(lambda *given: inspect.unwrap(decode.decode)(cfg, mesh, Sampler(), *given))(*arguments)
    (mapped,) = (one for one in closed.jaxpr.eqns if one.primitive.name == "shard_map")
    return read(mapped.params["jaxpr"], Target(dict(mesh.shape), cpu))


def peak(name: Name, program: Program, bound: Bound) -> int:
    """Return the most bytes that prefill or decoding takes, its inputs among them."""
    arguments = sum(value.size for value in program.inputs) + (_copies(name, bound) if bound.cpu else 0)
    if name == "prefill":
        return arguments + peak_bytes(program, forward=True)
    first = len(jax.tree.leaves(shapes(bound.cfg, bound.mesh, bound.params)))
    donated = dict(zip(program.inputs[first:], program.outputs, strict=False))  # the state changes in its place
    return arguments + peak_bytes(program, donated, forward=True)


def _copies(name: Name, bound: Bound) -> int:
    """Return what XLA's backend for CPUs copies before a loop: half precision as float32, and often the cache."""
    half, held, copies = bound.cfg.compute != "float32", weight_bytes(bound), 0
    if half:
        copies += 2 * held.plain + (2 * held.outer if name == "decode" else 0)
    if name == "decode" and (half or bound.batch.groups > 1 or bound.batch.rows == 1):
        copies += cache_bytes(bound)
    return copies


def _loop(program: Program) -> Operation:
    """Return the loop over ticks."""
    (loop,) = (one for one in program.operations if one.bodies)
    return loop


def bracket(bound: Bound, prefill: Program, decoding: Program, device: Device) -> tuple[Rate, Rate]:
    """Return the rate if nothing overlaps, and that if everything does.

    Args:
        bound: of `bind`.
        prefill, decoding: of `trace`.
        device: of all.
    """
    sizes, batch, held = bound.mesh.shape, bound.batch, weight_bytes(bound)
    stages = sizes["pipeline"]
    of_group = cache_bytes(bound) / batch.groups
    ticks = batch.groups + stages - 1
    reading = load(_loop(prefill).bodies[0], sizes)
    glm = bound.cfg.model
    # fused attention does not show its products
    layers = stages * partition.layers_held(glm.num_layers, stages) / glm.num_layers
    row = glm.forward_flops(batch.room) - 2 * glm.hidden_size * glm.vocab_size * batch.room
    of_rows = row * layers * batch.rows / math.prod(sizes.values())
    reading = reading._replace(flops=max(reading.flops, of_rows))
    writing = load(_loop(decoding).bodies[0], sizes)
    pairs = [(in_turn(reading, device, sizes), in_turn(writing, device, sizes)),
             (at_once(reading, held.layers + of_group, device, sizes),
              at_once(writing, held.outer + held.layers + of_group, device, sizes))]  # fmt: skip
    slowest, fastest = (
        Rate(ticks * context, tick, batch.rows / tick, 1 / (batch.groups * tick)) for context, tick in pairs
    )
    return slowest, fastest


def in_turn(load: Load, device: Device, sizes: Mapping[str, int]) -> float:
    """Return the seconds of a load of which nothing overlaps."""
    links = sum(speed.link_seconds(load.sent, device, sizes).values())
    return load.flops / device.peak + load.moved / device.bandwidth + load.latencies * LATENCY + links


def at_once(load: Load, needed: float, device: Device, sizes: Mapping[str, int]) -> float:
    """Return the seconds of a load of which everything overlaps, and that reads and writes no more than is needed."""
    links = speed.link_seconds(load.sent, device, sizes).values()
    return max(load.flops / device.peak, needed / device.bandwidth, *links)


def load(program: Program, sizes: Mapping[str, int]) -> Load:
    """Return the load of a program; a loop that does not say how many turns it takes has one, as in a busy stage."""
    flops = moved = latencies = 0.0
    sent: Counter[str] = Counter()
    for kernel, turns in _kernels(program):
        flops += turns * kernel.operation.flops
        moved += turns * kernel.moved
        latencies += turns * max(1, _hops(kernel.operation, sizes))
        for axes, size in kernel.operation.sent.items():
            sent[axes] += turns * size
    return Load(flops, moved, latencies, dict(sent))


def _kernels(program: Program) -> Iterator[tuple[Kernel, int]]:
    """Yield the kernels of a program and its loops, with their turns."""
    for kernel in kernels(program)[0]:
        one = kernel.operation
        for body in one.bodies:
            for inner, turns in _kernels(body):
                yield inner, turns * (one.turns or 1)
        if not one.bodies:
            yield kernel, 1


def _hops(one: Operation, sizes: Mapping[str, int]) -> int:
    """Return how many messages of a collective follow one another, around a ring."""
    axes = [axis for named in one.sent for axis in named.split("+")]
    steps = math.prod(sizes[axis] for axis in axes) - 1
    if one.kind == "ppermute":
        return 1
    return 2 * steps if one.kind in ALL_REDUCES else steps
