"""Memory of a training step as estimated and as compiled for emulated CPU devices; run in a subprocess.

    python tests/planning/peaks.py '[{"mesh.data": 2}, ...]'

Prints one JSON list with a pair of bytes a device for each set of changes to a small experiment.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":
    os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of LLVM, after buffers are assigned

from typing import Any  # noqa: E402 (jax reads the environment)

import jax  # noqa: E402

from glm_jax.config import Experiment, resolve
from glm_jax.engine import build
from glm_jax.parallel import partition  # noqa: E402
from glm_jax.parallel.device_sheet import Device  # noqa: E402
from glm_jax.planning import estimate, tracing  # noqa: E402
from glm_jax.training import step  # noqa: E402
from glm_jax.training.state import state_specs  # noqa: E402
from glm_jax.training.stretch import step_config  # noqa: E402
from glm_jax.types import Tree  # noqa: E402

PIECES = 1000
SMALL = {
    "model.num_layers": 4, "model.hidden_size": 128, "model.num_heads": 4, "model.ffn_size": 344,
    "model.vocab_size": 1024, "data.seq_length": 256, "train.global_batch": 16, "train.microbatches": 4,
    "mesh.data": 1, "pipeline.stash": "layer",
}  # fmt: skip
CPU = Device("cpu", (), 1e11, 8 << 30, 1e10, 1e10, "none: only memory is read")


def lower(experiment: Experiment) -> jax.stages.Lowered:
    """Lower the step of an experiment for this process's devices, from shapes."""
    engine, mesh = build(experiment, PIECES)
    cfg = step_config(experiment, engine)

    def describe(shapes: Tree, specs: Tree) -> Tree:
        places = partition.shardings(mesh, specs)
        return jax.tree.map(lambda leaf, at: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=at), shapes, places)

    rows = tracing.batch_shapes(experiment)
    batch = describe(rows, jax.tree.map(lambda array: partition.batch_spec(array.ndim), rows))
    scalar, requests = jax.ShapeDtypeStruct((), "float32"), jax.ShapeDtypeStruct((mesh.size,), "int32")
    controls = step.Controls(*describe((scalar, scalar, requests), (jax.P(), jax.P(), jax.P(mesh.axis_names))))
    state = describe(tracing.state_shapes(cfg, mesh), state_specs(cfg, mesh))
    whole = dataclasses.replace(cfg, lora=None)
    base = describe(tracing.model_shapes(cfg, mesh), state_specs(whole, mesh).params) if cfg.lora else ()
    train, _ = step.compile_steps(cfg, mesh)
    return train.lower(state, batch, controls, base)


def peaks(changes: dict[str, Any], device: Device = CPU) -> tuple[int, int]:
    """Return the bytes of a device as estimated and as compiled."""
    experiment = resolve({}, SMALL | changes)
    memory = lower(experiment).compile().memory_analysis()
    assert memory is not None
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return estimate.plan(experiment, device, PIECES).memory.total, whole + memory.temp_size_in_bytes


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        print(json.dumps(list(pool.map(peaks, json.loads(sys.argv[1])))))
