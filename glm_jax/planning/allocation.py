"""The most memory that a program's buffers take at once, by the rules of program.py.

An update or a loop takes the buffer of what it replaces, if nobody else reads that any more. What a loop carries stays
in one place, unless the old is still read when the new is made. An elementwise kernel has a buffer of its own: XLA lets
some of them write over their inputs, and not others.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from glm_jax.planning.program import HEAVY, LOOPS, UPDATES, Kernel, Operation, Program, Value, kernels


@dataclasses.dataclass(eq=False)
class Buffer:
    """A place in memory, which one value after another may take."""

    size: int
    own: bool  # whether the program has allocated it, and not freed it


def peak_bytes(program: Program, donated: Mapping[Value, Value] | None = None, *, forward: bool = False) -> int:
    """Return the most bytes that a program's buffers take at once, beside its inputs.

    Args:
        program: what runs.
        donated: inputs whose place an output takes.
        forward: whether it is a pass without gradients, in which elementwise kernels write over inputs that nobody else
            reads.
    """
    return _Run(program, donated or {}, forward).peak


def turn_bytes(loop: Operation, *, forward: bool = False) -> int:
    """Return what a turn of a loop takes at most, beside what it is given and carries on."""

    def of(body: Program) -> int:
        stop = loop.constants + loop.carried
        carried = dict(zip(body.inputs[loop.constants : stop], body.outputs, strict=False))
        return _Run(body, carried, forward).peak + sum(value.size for value in body.inputs[stop:])

    return max(map(of, loop.bodies))


class _Run:
    """The kernels of a program in order, with the buffers in use.

    Args:
        program: what runs.
        carried: inputs whose place an output takes.
        forward: see `peak_bytes`.
    """

    def __init__(self, program: Program, carried: Mapping[Value, Value], forward: bool) -> None:
        self.forward = forward
        found, of_outputs = kernels(program, repeats=not program.cpu)
        self.last = {value: index for index, kernel in enumerate(found) for value in kernel.reads}
        self.last |= {base: len(found) for reads in of_outputs.values() for base in reads}
        self.home = {base: value for value, output in carried.items() for base in of_outputs[output]}
        self.carried = set(carried)
        self.at = {value: Buffer(value.size, own=False) for value in program.inputs}
        self.live = self.peak = 0
        for index, kernel in enumerate(found):
            self._run(index, kernel)

    def _run(self, index: int, kernel: Kernel) -> None:
        one = kernel.operation
        dying = [value for value in kernel.reads if self.last[value] == index]
        reused: set[Buffer] = set()
        for value in kernel.writes:
            buffer = self._free_place(index, value, self._candidates(one, dying), reused)
            if buffer is None:
                buffer = Buffer(value.size, own=True)
                self.live += value.size
            reused.add(buffer)
            self.at[value] = buffer
        inside = turn_bytes(one, forward=self.forward) if one.bodies else one.scratch
        self.peak = max(self.peak, self.live + inside)
        for value in dying:
            self._free(self.at.get(value), reused)
        for value in kernel.writes:
            if value not in self.last:
                self._free(self.at[value], set())

    def _candidates(self, one: Operation, dying: list[Value]) -> list[Value]:
        """Return the values whose place the results of an operation may take."""
        in_place = one.kind in LOOPS or one.kind in UPDATES or (self.forward and one.kind not in HEAVY)
        return dying if in_place else []

    def _free_place(self, index: int, value: Value, candidates: list[Value], reused: set[Buffer]) -> Buffer | None:
        """Return a place for a value that is in use no more, of its size, if there is one."""
        home = self.home.get(value)
        if home is not None and (self.last.get(home, -1) < index or home in candidates):
            candidates = [home, *candidates]
        for base in candidates:
            buffer = self.at.get(base)
            if buffer is None or buffer in reused or buffer.size != value.size:
                continue
            if buffer.own or base in self.carried:
                return buffer
        return None

    def _free(self, buffer: Buffer | None, reused: set[Buffer]) -> None:
        if buffer is not None and buffer.own and buffer not in reused:
            self.live -= buffer.size
            buffer.own = False
