"""Compiles the engine on a 2 x 2 x 2 mesh and prints what the compiled programs are like; run in a subprocess.

Prints one JSON object: temporary bytes a device by schedule and microbatches, and the collectives of the 1f1b program
that sit inside a loop and outside, by the mesh axes over which they talk.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterator

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import jax  # noqa: E402 (reads the environment)
import numpy as np  # noqa: E402

from glm_jax import model  # noqa: E402
from glm_jax.model import GLMConfig  # noqa: E402
from glm_jax.parallel import mesh, partition  # noqa: E402
from glm_jax.training import engine  # noqa: E402

LENGTH, SHAPE = 16, (2, 2, 2)
COLLECTIVES = "all-reduce|all-gather|reduce-scatter|collective-permute|all-to-all"


def lower(schedule: str, microbatches: int, keep: str = "layer") -> jax.stages.Lowered:
    """Lower the gradients of a small model with dropout, from shapes."""
    glm = GLMConfig(num_layers=3, hidden_size=16, num_heads=2, ffn_size=16, vocab_size=16, max_length=LENGTH)
    cfg = engine.EngineConfig(glm, 16, 3, schedule=schedule, keep=keep)  # pyright: ignore[reportArgumentType]
    grid = mesh.build(dict(zip(mesh.AXES, SHAPE, strict=True)))
    params = jax.eval_shape(
        lambda: partition.pad_layers(model.init(glm, jax.random.key(0)), model.logical_axes(glm), 2)
    )
    names = {name: ((microbatches, 2, LENGTH), "int32") for name in ("tokens", "targets", "positions", "segments")}
    names |= {"context": ((microbatches, 2, LENGTH), "bool"), "loss_mask": ((microbatches, 2, LENGTH), "float32")}
    names |= {"objective": ((microbatches, 2), "int32")}
    batch = {name: jax.ShapeDtypeStruct(*described) for name, described in names.items()}
    key = jax.random.key(0)
    return jax.jit(lambda params, batch: engine.value_and_grad(cfg, grid, params, batch, key)).lower(params, batch)


def computations(text: str) -> dict[str, str]:
    """Split an HLO module into its computations."""
    blocks = re.findall(r"^(?:ENTRY )?%?([\w.\-]+) \(.*?\{$(.*?)^\}", text, re.M | re.S)
    return dict(blocks)


def inside_loops(blocks: dict[str, str]) -> set[str]:
    """Name the computations that some while loop runs, however deep."""
    bodies = {body for text in blocks.values() for body in re.findall(r"body=%?([\w.\-]+)", text)}
    reached: set[str] = set()
    while bodies:
        name = bodies.pop()
        if name not in reached:
            reached.add(name)
            called = r"(?:body|condition|to_apply|calls|branch_computations)=\{?%?([\w.\-]+)"
            bodies |= set(re.findall(called, blocks[name]))
    return reached


def groups(line: str) -> Iterator[list[int]]:
    """Yield the groups of devices of a collective, in either of HLO's notations."""
    listed = re.search(r"(?:replica_groups|source_target_pairs)=\{(\{.*?\})\}", line)
    if listed:
        yield from ([int(i) for i in group.split(",")] for group in re.findall(r"\{([\d,]+)\}", listed[1]))
        return
    iota = re.search(r"replica_groups=\[([\d,]+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", line)
    assert iota, line
    shape, source = ([int(i) for i in iota[n].split(",")] for n in (1, 2))
    order = [int(i) for i in iota[3].split(",")] if iota[3] else list(range(len(source)))
    ids = np.arange(np.prod(source)).reshape(source).transpose(order).reshape(shape)
    yield from ids.tolist()


def axes_of(line: str) -> str:
    """Name the mesh axes along which the members of a collective's groups differ."""
    places = [np.array(np.unravel_index(group, SHAPE)) for group in groups(line)]  # [3, members] each
    differs = [any((place[axis] != place[axis, 0]).any() for place in places) for axis in range(3)]
    return "+".join(name for name, differ in zip(mesh.AXES, differs, strict=True) if differ)


def collectives(text: str) -> dict[str, dict[str, int]]:
    """Count collectives by axes, inside loops and outside."""
    blocks = computations(text)
    loops = inside_loops(blocks)
    found: dict[str, Counter[str]] = {"inside": Counter(), "outside": Counter()}
    for name, block in blocks.items():
        for line in block.splitlines():
            if re.search(rf" (?:{COLLECTIVES})(?:-start)?\(", line):
                found["inside" if name in loops else "outside"][axes_of(line)] += 1
    return {place: dict(counter) for place, counter in found.items()}


def temporary(compiled: jax.stages.Compiled) -> int:
    """Give the bytes of temporaries a device."""
    return compiled.memory_analysis().temp_size_in_bytes


if __name__ == "__main__":
    flat = lower("1f1b", 4).compile()
    report = {
        "collectives": collectives(flat.as_text() or ""),
        "1f1b": {"4": temporary(flat), "64": temporary(lower("1f1b", 64).compile())},
        "gpipe": {str(count): temporary(lower("gpipe", count).compile()) for count in (4, 64)},
    }
    print(json.dumps(report))
