"""Compare the estimated memory of prefill and decoding with the compiled one on meshes, weights and rows.

    python tests/proofs/generation_grid.py

On up to eight emulated CPU devices, with the small model of tests/planning/generated.py. Prints a line for each, with
the estimate as a share of the compiled peak. Fails if more than one in twenty is off by more than a tenth. Without
bfloat16: XLA for CPUs multiplies many rows of it as they are, and the estimate counts copies in float32, as of float16.
"""

from __future__ import annotations

import itertools
import os
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

from tests.planning.generated import peaks  # noqa: E402 (needs the path, and reads the environment)

MESHES = ((1, 1, 1), (1, 1, 2), (1, 2, 1), (1, 2, 2), (2, 1, 1))
WEIGHTS = ("float32", "float16", "int8", "int4")
ROWS = ((1, 128), (4, 256))
OFF = 0.1


def main() -> int:
    """Compare both; return 1 if the grid is off."""
    shares = []
    for mesh, weights, (rows, room) in itertools.product(MESHES, WEIGHTS, ROWS):
        sizes = dict(zip(("mesh.data", "mesh.pipeline", "mesh.tensor"), mesh, strict=True))
        estimated, compiled = peaks({**sizes, "weights": weights, "rows": rows, "room": room})
        shares.append(estimated / compiled)
        shown = "x".join(map(str, mesh))
        print(f"{shares[-1]:.3f} of {compiled / 1e6:6.2f} MB  {shown} {weights}, {rows} x {room}", flush=True)
    off = sum(abs(share - 1) > OFF for share in shares)
    mean = sum(shares) / len(shares)
    print(f"n = {len(shares)}, {min(shares):.3f} to {max(shares):.3f}, mean {mean:.3f}; {off} off by over {OFF}")
    return int(off > len(shares) / 20)


if __name__ == "__main__":
    sys.exit(main())
