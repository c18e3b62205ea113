"""What a device computes and sends in a training step, counted in the compiled program.

The trips of most loops are in the program. A slot's loop takes as many as the schedule gives it work, which is nowhere
in the program; but all slots of a step together work on each microbatch once, with each layer of the stage.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence

from glm_jax.parallel import partition
from glm_jax.parallel.pipeline.schedule import Schedule
from glm_jax.planning import buffers, hlo
from glm_jax.planning.hlo import Instruction, Loop

OF_BLOCKS = {"Stage.forward", "Stage.backward", "Stage._inputs"}  # whose loops turn once for each layer of a slot
OF_MICROBATCHES = {"when"}  # once, if the slot is not idle


@dataclasses.dataclass(frozen=True)
class Counted:
    """What a device of the stage with the most layers does in a step.

    Attributes:
        flops: floating-point operations of its matrix products; of those of fused kernels, none.
        sent: bytes that it sends around rings, by mesh axes.
        repeated: of these, bytes of collectives that XLA does again instead of keeping their results, where the program
            would take more memory than XLA has for it.
    """

    flops: float
    sent: Mapping[str, float]
    repeated: float = 0.0


def count(text: str, shape: Sequence[int], table: Schedule, layers: int) -> Counted:
    """Count the products and the collectives of a compiled training step, each as often as it runs.

    A loop over blocks of keys, whose trips depend on the tokens, counts as if every query saw every key.

    Args:
        text: of the compiled program.
        shape: of the mesh (data, pipeline, tensor).
        table: the schedule.
        layers: of the model.
    """
    program, sources = hlo.read(text), buffers.frames(text)
    blocks = table.microbatches * partition.layers_held(layers, table.stages)

    def runs(loops: Sequence[Loop]) -> float:
        """Return how often a step does what is in these loops."""
        total, last = 1.0, 1
        for loop in loops:
            source = sources.get(buffers.frame(loop.instruction))
            function = source.function.rpartition(" > ")[2] if source else ""
            if loop.trips is not None:
                total, last = total * loop.trips, loop.trips
            elif function in OF_BLOCKS:
                total *= blocks / table.ticks
            elif function in OF_MICROBATCHES:
                total *= table.microbatches / table.ticks
            else:
                total *= last
        return total

    flops, repeated, sent, seen = 0.0, 0.0, dict[str, float](), set[tuple[str, str]]()
    for instruction, computation, loops in program.walk():
        around = program.computations[computation]
        if instruction.opcode == "dot":
            flops += runs(loops) * product_flops(instruction, around)
        elif instruction.opcode.removesuffix("-start") in hlo.KINDS:
            axes = hlo.axes_of(instruction.attributes, tuple(shape))
            if axes:
                size = runs(loops) * sent_bytes(instruction, around, math.prod(shape))
                sent[axes] = sent.get(axes, 0.0) + size
                first = computation, re.sub(r"\.remat\d*$", "", instruction.name)  # XLA names others after it
                repeated += size if first in seen else 0.0
                seen.add(first)
    return Counted(flops, sent, repeated)


def product_flops(dot: Instruction, computation: Sequence[Instruction]) -> int:
    """Return the floating-point operations of a product; a multiply-add counts as 2."""
    left = re.findall(r"[\w.\-]+", dot.operands)
    names = {one.name: one.shape for one in computation}
    sizes = _dimensions(next(names[name] for name in left if name in names))
    contracted = re.search(r"lhs_contracting_dims=\{([\d,]*)\}", dot.attributes)
    summed = math.prod(sizes[int(axis)] for axis in contracted[1].split(",") if axis) if contracted else 1
    return 2 * summed * math.prod(_dimensions(dot.shape))


def sent_bytes(collective: Instruction, computation: Sequence[Instruction], devices: int) -> float:
    """Return the bytes that each member of a collective sends around a ring; what it sends to a neighbour, once."""
    kind, size = collective.opcode.removesuffix("-start"), hlo.payload(collective, computation)
    if kind == "collective-permute":
        return size
    others = 1 - 1 / hlo.members(collective.attributes, devices)
    return (2 if kind == "all-reduce" else 1) * others * size


def _dimensions(shape: str) -> list[int]:
    found = re.search(r"\[([\d,]*)\]", shape)
    return [int(size) for size in found[1].split(",") if size] if found else []
