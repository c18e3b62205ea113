"""Reads a compiled program, XLA's HLO as text: its collectives, their mesh axes, and the loops they are in."""

from __future__ import annotations

import functools
import math
import re
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from glm_jax.parallel.mesh import AXES

KINDS = ("all-reduce", "all-gather", "reduce-scatter", "collective-permute", "all-to-all")
BITS = {
    "pred": 8,
    "c64": 64,
    "c128": 128,
    "token": 0,
    "opaque": 0,
}  # of an element, where the name does not end in them

Loops = tuple[int | None, ...]  # trips of the loops around an instruction, outermost first; None: known only as it runs


class Instruction(NamedTuple):
    """A line of a computation."""

    name: str
    shape: str  # such as f32[8,128]{1,0}, or several in parentheses
    opcode: str
    operands: str  # what is in the parentheses behind the opcode
    attributes: str  # what follows them


class Loop(NamedTuple):
    """A loop that an instruction is in."""

    instruction: Instruction
    trips: int | None  # None: known only as it runs


@dataclass(frozen=True)
class Program:
    """A compiled program: its computations by name, and the name of the one where it starts."""

    computations: Mapping[str, tuple[Instruction, ...]]
    entry: str

    def walk(self, *, fused: bool = True) -> Iterator[tuple[Instruction, str, tuple[Loop, ...]]]:
        """Yield every instruction that runs, its computation's name, and the loops around it, outermost first.

        With fused=False those inside of fusions, reductions and the like are left out.
        """
        yield from self._walk(self.entry, (), fused)

    def _walk(
        self, name: str, loops: tuple[Loop, ...], fused: bool
    ) -> Iterator[tuple[Instruction, str, tuple[Loop, ...]]]:
        for instruction in self.computations[name]:
            yield instruction, name, loops
            opcode = instruction.opcode
            if opcode in ("async-update", "async-done"):  # they name what async-start runs
                continue
            if not (fused or opcode in ("while", "conditional", "call", "async-start")):
                continue
            inner = loops
            if opcode == "while":
                inner = (*loops, Loop(instruction, self._trips(instruction.attributes)))
            for called in _called(instruction.attributes):
                yield from self._walk(called, inner, fused)

    def _trips(self, attributes: str) -> int | None:
        """Return the trips of a loop; None if they are known only as it runs."""
        known = re.search(r'"known_trip_count":\{"n":"(\d+)"', attributes)
        if known:
            return int(known[1])
        # TPU's compiler does not say it: a loop of jax's counts from 0 to what its condition says
        condition = re.search(r"condition=%?([\w.\-]+)", attributes)
        lines = {one.name: one for one in self.computations[condition[1]]} if condition else {}
        for line in lines.values():
            if line.opcode == "compare" and "direction=LT" in line.attributes:
                limit = lines.get(line.operands.rpartition(" ")[2].lstrip("%"))
                if limit and limit.opcode == "constant" and limit.operands.isdecimal():
                    return int(limit.operands)
        return None


@dataclass(frozen=True)
class Collective:
    """Collectives of one kind along the same axes and in the same loops.

    Attributes:
        kind: one of KINDS.
        axes: of the mesh along which members differ, such as `pipeline+tensor`; empty if there is but one member.
        loops: trips of the loops around them; empty outside of loops.
        count: how many there are in the program.
        bytes: of the arrays that they work on, on one device and if each runs once: what an all-gather returns, what
            the others take.
    """

    kind: str
    axes: str
    loops: Loops
    count: int
    bytes: int


def read(text: str) -> Program:
    """Read a module's text, as `jax.stages.Compiled.as_text` returns it."""
    computations, entry = dict[str, tuple[Instruction, ...]](), ""
    for start, name, body in re.findall(r"^(ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.M | re.S):
        computations[name] = tuple(filter(None, map(_instruction, body.splitlines())))
        entry = name if start else entry
    return Program(computations, entry)


def collectives(text: str, shape: Sequence[int]) -> tuple[Collective, ...]:
    """Return the collectives of a program for a mesh of this shape (data, pipeline, tensor): in loops first."""
    program = read(text)
    counts, sizes = Counter[tuple[str, str, Loops]](), Counter[tuple[str, str, Loops]]()
    for instruction, computation, loops in program.walk():
        kind = instruction.opcode.removesuffix("-start")
        if kind in KINDS:
            key = kind, axes_of(instruction.attributes, tuple(shape)), tuple(loop.trips for loop in loops)
            counts[key] += 1
            sizes[key] += payload(instruction, program.computations[computation])
    found = [Collective(*key, count, sizes[key]) for key, count in counts.items()]
    return tuple(sorted(found, key=lambda one: (-len(one.loops), one.axes, -one.bytes)))


def shape_bytes(shape: str) -> int:
    """Return the bytes of a shape, or of all shapes of a tuple; elements of 4 bits take half a byte."""
    total = 0
    for kind, dimensions in re.findall(r"\b([a-z]\w*)\[([\d,<=]*)\]", shape):
        bits = BITS[kind] if kind in BITS else int(re.sub(r"^[a-z]+", "", kind.split("e")[0]))
        total += math.prod(int(size.strip("<=")) for size in dimensions.split(",") if size) * bits
    return total // 8


@functools.lru_cache(maxsize=1024)  # many collectives have the same groups
def axes_of(attributes: str, shape: tuple[int, ...]) -> str:
    """Return the names of the mesh axes along which the members of a collective's groups differ."""
    places = [np.array(np.unravel_index(group, shape)) for group in _groups(attributes, math.prod(shape))]
    differs = [any((place[axis] != place[axis, 0]).any() for place in places) for axis in range(len(shape))]
    return "+".join(name for name, differ in zip(AXES, differs, strict=True) if differ)


def members(attributes: str, devices: int) -> int:
    """Return how many devices a group of a collective has."""
    return len(_groups(attributes, devices)[0])


def _instruction(line: str) -> Instruction | None:
    """Return a line's instruction; None if it is none."""
    found = re.match(r"\s+(?:ROOT )?%?([\w.\-]+) = ", line)
    if not found:
        return None
    rest = line[found.end() :]
    end = _closing(rest) if rest.startswith("(") else rest.index(" ")
    shape, rest = rest[:end], rest[end:].lstrip()
    opcode, _, rest = rest.partition("(")
    end = _closing("(" + rest) - 2
    return Instruction(found[1], shape, opcode, rest[:end], rest[end + 1 :])


def _closing(text: str) -> int:
    """Return the index behind the parenthesis that closes the one with which the text begins."""
    depth = 0
    for found in re.finditer(r"[()]", text):
        depth += 1 if found[0] == "(" else -1
        if depth == 0:
            return found.end()
    return len(text)


def _called(attributes: str) -> list[str]:
    """Return the computations that an instruction runs."""
    keys = "body|condition|to_apply|calls|branch_computations|true_computation|false_computation|called_computations"
    found = re.findall(rf"\b(?:{keys})=(?:\{{([^}}]*)\}}|%?([\w.\-]+))", attributes)
    return [name.strip().lstrip("%") for several, one in found for name in (one or several).split(",")]


def payload(collective: Instruction, computation: Sequence[Instruction]) -> int:
    """Return the bytes of what an all-gather returns, and of what other collectives take."""
    names = set(re.findall(r"[\w.\-]+", collective.operands))
    taken = sum(shape_bytes(one.shape) for one in computation if one.name in names)
    if not collective.opcode.startswith("all-gather"):
        return taken
    # an asynchronous one returns what it takes, too
    return shape_bytes(collective.shape) - (taken if collective.opcode.endswith("-start") else 0)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]


def _iota(dimensions: str, order: str | None) -> np.ndarray:
    """Return the ids 0, 1, ... in an array of these dimensions, with its axes transposed to this order."""
    ids = np.arange(np.prod(_numbers(dimensions))).reshape(_numbers(dimensions))
    return ids.transpose(_numbers(order)) if order else ids


def _groups(attributes: str, devices: int) -> list[list[int]]:
    """Return the groups of devices of a collective, from any of HLO's notations."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", attributes)
    if listed:
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", attributes)
    if tiled:
        return _iota(tiled[2], tiled[3]).reshape(_numbers(tiled[1])).tolist()
    pattern = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
    named = re.search(pattern, attributes)
    if named is None:
        if "replica_groups={}" in attributes:  # all of them
            return [list(range(devices))]
        raise ValueError(f"unknown notation of groups: {attributes[:200]}")
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    shape = list(sizes.values())
    ids = _iota(named[2], named[3]) if named[2] else np.arange(np.prod(shape))
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    rest = [axis for axis in range(len(shape)) if axis not in along]
    members = int(np.prod([shape[axis] for axis in along]))
    return ids.reshape(shape).transpose(rest + along).reshape(-1, members).tolist()
