"""Memory of prefill and decoding as estimated and as compiled for emulated CPU devices; run in a subprocess.

    python tests/planning/generated.py '[{"weights": "int4", "mesh.tensor": 2}, ...]'

Prints a line of JSON for each set of changes to a small experiment and its inference, with a pair of bytes a device.
"""

from __future__ import annotations

import json
import os
import sys

if __name__ == "__main__":
    os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # of LLVM, after buffers are assigned

from typing import Any  # noqa: E402 (jax reads the environment)

import jax  # noqa: E402

from glm_jax.config import resolve
from glm_jax.planning import estimate, generation, programs  # noqa: E402
from glm_jax.planning.programs import Inference
from tests.planning.peaks import PIECES, compiled_bytes

SMALL = {
    "model.num_layers": 4, "model.hidden_size": 256, "model.num_heads": 8, "model.ffn_size": 512,
    "model.vocab_size": 1024, "data.tokenizer.vocab_size": PIECES, "mesh.data": 1,
}  # fmt: skip
DEFAULTS = {"weights": "float32", "room": 256, "rows": 4}


def peaks(changes: dict[str, Any]) -> tuple[int, int]:
    """Return the bytes of a device as estimated and as compiled, of the program that takes more."""
    inference = Inference(**{key: changes.get(key, value) for key, value in DEFAULTS.items()})
    experiment = resolve({}, SMALL | {key: value for key, value in changes.items() if key not in DEFAULTS})
    compiled = max(
        compiled_bytes(programs.lower(name, experiment, jax.devices(), inference=inference)[0])
        for name in ("prefill", "decode")
    )
    return generation.plan(experiment, inference, estimate.PROCESSOR, PIECES).memory.total, compiled


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(peaks(one)), flush=True)
