"""The arrays that a compiled program makes, the largest first, with the lines of ours that they come from."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from glm_jax.planning import hlo
from glm_jax.planning.hlo import Instruction, Program

ROOT = Path(__file__).parents[1]  # glm_jax/
# what makes no array, but hands on what its operands are or what is made in its computations
HANDED_ON = {
    "bitcast", "tuple", "get-tuple-element", "while", "conditional", "call", "optimization-barrier", "after-all",
    "dynamic-update-slice", "scatter", "async-start", "async-update", "async-done", "copy-done",
    *(f"{kind}-done" for kind in hlo.KINDS),
}  # fmt: skip
AROUND = {"shard_map", "while", "body", "cond", "closed_call", "eval_jaxpr", "checkpoint", "jvp()", "transpose(jvp())"}
IN_PLACE = {"dynamic-update-slice", "scatter"}  # as the root of a fusion, too


@dataclass(frozen=True)
class Buffer:
    """Arrays of one shape that come from one place. Those of different places may use the same memory in turn.

    Attributes:
        shape: of each, with its dtype, such as `f32[9,12288,2,8192]`.
        bytes: of each, on one device.
        count: how many there are in the program.
        operation: the path of an argument, or the operation of jax that makes it.
        line: the innermost of glm_jax, such as `parallel/pipeline/stage.py:61`; empty for arguments.
        function: that it is in, behind its caller, such as `Stage.empty_stash > zeros`.
    """

    shape: str
    bytes: int
    count: int
    operation: str
    line: str
    function: str


class Source(NamedTuple):
    """A line of glm_jax, and the function that it is in."""

    line: str
    function: str


def largest(text: str, count: int) -> tuple[Buffer, ...]:
    """Return the largest arrays of a program, given its text, at most `count` of them."""
    program, sources = hlo.read(text), frames(text)
    found = Counter[tuple[str, str, str, str]]()
    for instruction, computation, _ in program.walk(fused=False):
        for shape in _made(program, instruction, entry=computation == program.entry):
            found[shape, _operation(instruction), *sources.get(frame(instruction), Source("", ""))] += 1
    sized = [Buffer(shape, hlo.shape_bytes(shape), number, *place) for (shape, *place), number in found.items()]
    return tuple(sorted(sized, key=lambda buffer: (-buffer.bytes, buffer.shape, buffer.operation))[:count])


def _made(program: Program, instruction: Instruction, *, entry: bool) -> Iterator[str]:
    """Yield the shapes of the arrays that an instruction makes."""
    opcode = instruction.opcode
    if opcode in HANDED_ON or (opcode == "parameter" and not entry):
        return
    shapes = re.findall(r"\b[a-z]\w*\[[\d,]*\]", instruction.shape)
    if opcode == "fusion":
        (called,) = re.findall(r"\bcalls=%?([\w.\-]+)", instruction.attributes)
        yield from _made_by_fusion(program, called, shapes)
    elif opcode.endswith("-start"):  # what it takes, what it makes, and counters
        yield max(shapes, key=hlo.shape_bytes)
    else:
        yield from shapes


def _made_by_fusion(program: Program, name: str, shapes: list[str]) -> Iterator[str]:
    """Yield the shapes of a fusion's results without those that it changes in place."""
    lines = {one.name: one for one in program.computations[name]}
    root = lines[next(reversed(lines))]
    several = re.findall(r"[\w.\-]+", root.operands) if root.opcode == "tuple" else [root.name]
    results = [lines[name] for name in several if name in lines]
    for shape, result in zip(shapes, results, strict=False):
        while result.opcode in ("bitcast", "copy"):
            result = next(lines[name] for name in re.findall(r"[\w.\-]+", result.operands) if name in lines)
        if result.opcode not in IN_PLACE:
            yield shape


def _operation(instruction: Instruction) -> str:
    """Return jax's name of an instruction without the loops and calls around it, or XLA's own name."""
    named = re.search(r'op_name="((?:[^"\\]|\\.)*)"', instruction.attributes)
    if not named:
        return instruction.name
    first, *inner = re.sub(r"\\(.)", r"\1", named[1]).split("/")
    operations = [name for name in inner if name not in AROUND]
    return "/".join(operations) or ([first, *inner][-1])


def frame(instruction: Instruction) -> int:
    """Return the number of an instruction's stack frame, 0 if it has none."""
    found = re.search(r"stack_frame_id=(\d+)", instruction.attributes)
    return int(found[1]) if found else 0


def frames(text: str) -> Mapping[int, Source]:
    """Return the innermost line of glm_jax of every stack frame that has one."""
    header = text.partition("\n%")[0]
    files, functions = _names(header, "FileNames"), _names(header, "FunctionNames")
    places = {
        int(number): (Path(files[int(file)]), _plain(functions[int(function)]), line)
        for number, file, function, line in re.findall(
            r"^(\d+) \{file_name_id=(\d+) function_name_id=(\d+) line=(\d+)", header, re.M
        )
    }
    frames = {
        int(number): (places[int(place)], int(parent) - 1)  # 1 is no parent
        for number, place, parent in re.findall(
            r"^(\d+) \{file_location_id=(\d+) parent_frame_id=(\d+)\}", header, re.M
        )
    }

    def ours(number: int) -> list[tuple[Path, str, str]]:
        """Return the places of glm_jax in a frame and those that called it, the innermost first."""
        found = list[tuple[Path, str, str]]()
        while number in frames:
            place, parent = frames[number]
            number = parent if parent < number else 0  # callers come first; a table of another form has no end
            found += [place] if place[0].is_relative_to(ROOT) else []
        return found

    found = dict[int, Source]()
    for number in frames:
        if stack := ours(number):
            name, function, line = stack[0]
            callers = [caller for _, caller, _ in stack if caller != function]
            found[number] = Source(f"{name.relative_to(ROOT)}:{line}", " > ".join([*callers[:1], function]))
    return found


def _names(header: str, table: str) -> Mapping[int, str]:
    """Return a table of names of a module's header."""
    lines = header.partition(f"\n{table}\n")[2].partition("\n\n")[0]
    return {int(number): name for number, name in re.findall(r'^(\d+) "(.*)"$', lines, re.M)}


def _plain(function: str) -> str:
    """Return a function's name without the functions inside it."""
    return function.partition(".<locals>")[0]
