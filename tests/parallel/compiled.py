"""Compiles the engine on a 2 x 2 x 2 mesh and prints facts about the compiled programs; run in a subprocess.

Prints one JSON object: temporary bytes a device by schedule and microbatches, and the collectives of the 1f1b program
inside and outside loops, by the mesh axes that they use.
"""

from __future__ import annotations

import json
import os
from collections import Counter

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of LLVM, after buffers are assigned

import jax  # noqa: E402 (reads the environment)

from glm_jax import model  # noqa: E402
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import bind, passes  # noqa: E402
from glm_jax.model import GLMConfig  # noqa: E402
from glm_jax.parallel import mesh, partition  # noqa: E402
from glm_jax.planning import hlo  # noqa: E402

LENGTH, SHAPE = 16, (2, 2, 2)


def lower(schedule: str, microbatches: int, keep: str = "layer") -> jax.stages.Lowered:
    """Lower the gradients of a small model with dropout, from shapes."""
    glm = GLMConfig(3, 16, 2, 16, 16, max_length=LENGTH, attention_dropout=0.1, hidden_dropout=0.1)
    cfg = bind.EngineConfig(glm, 16, 3, schedule=schedule, keep=keep)  # pyright: ignore[reportArgumentType]
    grid = mesh.build(dict(zip(mesh.AXES, SHAPE, strict=True)))
    params = jax.eval_shape(
        lambda: partition.pad_layers(model.init(glm, jax.random.key(0)), model.logical_axes(glm), 2)
    )
    batch = Rows.abstract((microbatches, 2, LENGTH))
    key = jax.random.key(0)
    return jax.jit(lambda params, batch: passes.value_and_grad(cfg, grid, params, batch, key)).lower(params, batch)


def axes(text: str) -> dict[str, dict[str, int]]:
    """Count collectives by the mesh axes that they use, inside loops and outside."""
    found: dict[str, Counter[str]] = {"inside": Counter(), "outside": Counter()}
    for one in hlo.collectives(text, SHAPE):
        found["inside" if one.loops else "outside"][one.axes] += one.count
    return {place: dict(counter) for place, counter in found.items()}


def temporary(compiled: jax.stages.Compiled) -> int:
    """Return the bytes of temporaries a device."""
    memory = compiled.memory_analysis()
    assert memory is not None
    return memory.temp_size_in_bytes


if __name__ == "__main__":
    flat = lower("1f1b", 4).compile()
    report = {
        "collectives": axes(flat.as_text() or ""),
        "1f1b": {"4": temporary(flat), "64": temporary(lower("1f1b", 64).compile())},
        "gpipe": {str(count): temporary(lower("gpipe", count).compile()) for count in (4, 64)},
    }
    print(json.dumps(report))
