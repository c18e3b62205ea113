"""Reads the collectives of a compiled program: which mesh axes they use, and whether they are inside a loop."""

from __future__ import annotations

import re
from collections import Counter

import numpy as np

from glm_jax.parallel.mesh import AXES

COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def computations(text: str) -> dict[str, str]:
    """Split an HLO module into its computations."""
    blocks = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.M | re.S)
    return dict(blocks)


def inside_loops(blocks: dict[str, str]) -> set[str]:
    """Return the names of the computations that a while loop runs, however deeply nested."""
    bodies = {body for text in blocks.values() for body in re.findall(r"body=%?([\w.\-]+)", text)}
    reached: set[str] = set()
    while bodies:
        name = bodies.pop()
        if name not in reached:
            reached.add(name)
            called = r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)"
            bodies |= set(re.findall(called, blocks[name]))
    return reached


def numbers(text: str) -> list[int]:
    """Return the integers between commas."""
    return [int(number) for number in text.split(",")]


def iota(dimensions: str, order: str | None) -> np.ndarray:
    """Return the ids 0, 1, ... in an array of these dimensions, with its axes transposed to this order."""
    ids = np.arange(np.prod(numbers(dimensions))).reshape(numbers(dimensions))
    return ids.transpose(numbers(order)) if order else ids


def groups(line: str) -> list[list[int]]:
    """Return the groups of devices of a collective, from any of HLO's three notations."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        return [numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed[1])]
    tiled = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    if tiled:
        return iota(tiled[2], tiled[3]).reshape(numbers(tiled[1])).tolist()
    pattern = r"replica_groups=mesh\[([^\]]*)\](?:, device_ids=\(\[([\d,]+)\](?:T\(([\d,]+)\))?\))? \{([^}:]*)\}"
    named = re.search(pattern, line)
    assert named, line
    sizes = {name: int(size) for name, size in re.findall(r"'(\w+)'=(\d+)", named[1])}
    shape = list(sizes.values())
    ids = iota(named[2], named[3]) if named[2] else np.arange(np.prod(shape))
    along = [list(sizes).index(name) for name in re.findall(r"'(\w+)'", named[4])]
    rest = [axis for axis in range(len(shape)) if axis not in along]
    members = int(np.prod([shape[axis] for axis in along]))
    return ids.reshape(shape).transpose(rest + along).reshape(-1, members).tolist()


def axes_of(line: str, shape: tuple[int, ...]) -> str:
    """Return the names of the mesh axes along which the members of a collective's groups differ."""
    places = [np.array(np.unravel_index(group, shape)) for group in groups(line)]  # [3, members] each
    differs = [any((place[axis] != place[axis, 0]).any() for place in places) for axis in range(len(shape))]
    return "+".join(name for name, differ in zip(AXES, differs, strict=True) if differ)


def collectives(text: str, shape: tuple[int, ...]) -> dict[str, dict[str, int]]:
    """Count collectives by axes of a mesh of this shape, inside loops and outside."""
    blocks = computations(text)
    loops = inside_loops(blocks)
    found: dict[str, Counter[str]] = {"inside": Counter(), "outside": Counter()}
    for name, block in blocks.items():
        for line in block.splitlines():
            if re.search(rf" (?:{COLLECTIVES})(?:-start)?\(", line):
                found["inside" if name in loops else "outside"][axes_of(line, shape)] += 1
    return {place: dict(counter) for place, counter in found.items()}
