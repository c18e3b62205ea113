"""Memory of a training step as estimated and as compiled for emulated CPU devices; run in a subprocess.

    python tests/planning/peaks.py '[{"mesh.data": 2}, ...]'

Prints a line of JSON for each set of changes to a small experiment, with a pair of bytes a device.
"""

from __future__ import annotations

import json
import os
import sys
from concurrent.futures import ThreadPoolExecutor

if __name__ == "__main__":
    os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of LLVM, after buffers are assigned

from typing import Any  # noqa: E402 (jax reads the environment)

import jax  # noqa: E402

from glm_jax.config import resolve
from glm_jax.parallel.device_sheet import Device  # noqa: E402
from glm_jax.planning import estimate, programs  # noqa: E402

PIECES = 1000
SMALL = {
    "model.num_layers": 4, "model.hidden_size": 128, "model.num_heads": 4, "model.ffn_size": 344,
    "model.vocab_size": 1024, "data.tokenizer.vocab_size": PIECES,
    "data.seq_length": 256, "train.global_batch": 16, "train.microbatches": 4,
    "mesh.data": 1, "pipeline.stash": "layer",
}  # fmt: skip


def peaks(changes: dict[str, Any], device: Device = estimate.PROCESSOR) -> tuple[int, int]:
    """Return the bytes of a device as estimated and as compiled."""
    experiment = resolve({}, SMALL | changes)
    compiled = compiled_bytes(programs.lower("step", experiment, jax.devices())[0])
    return estimate.plan(experiment, device, PIECES).memory.total, compiled


def compiled_bytes(lowered: jax.stages.Lowered) -> int:
    """Return the bytes that a program takes of a device as compiled: what it is given and makes, and temporaries."""
    memory = lowered.compile().memory_analysis()
    assert memory is not None
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    return whole + memory.temp_size_in_bytes


if __name__ == "__main__":
    with ThreadPoolExecutor(2) as pool:
        for pair in pool.map(peaks, json.loads(sys.argv[1])):
            print(json.dumps(pair), flush=True)
