"""Compare the engine with plain autodiff on all 10 factorisations of 8 devices, two schedules and two stashes.

python tests/proofs/parity_matrix.py [--x64]   # 5 to 10 minutes; one line for each case; exit code 1 if an error
exceeds 1e-5
                                               # (1e-9 with --x64)
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path


def cases(x64: bool) -> list[dict]:
    """List the 40 cases; deep pipelines get uneven layers."""
    meshes = [(d, p, 8 // d // p) for d in (1, 2, 4, 8) for p in (1, 2, 4, 8) if d * p <= 8]
    layers = {1: 3, 2: 3, 4: 5, 8: 9}
    return [
        {
            "mesh": mesh,
            "model": {"num_layers": layers[mesh[1]]},
            "engine": {"schedule": schedule, "keep": keep},
            "x64": x64,
        }
        for mesh in meshes
        for schedule in ("1f1b", "gpipe")
        for keep in ("layer", "stage")
    ]


def main() -> int:
    """Run all cases in one process and print the errors of each."""
    x64 = "--x64" in sys.argv[1:]
    bound = 1e-9 if x64 else 1e-5
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-m", "tests.parallel.parity", json.dumps(cases(x64))]
    bad = 0
    with subprocess.Popen(command, cwd=root, env=os.environ, stdout=subprocess.PIPE, text=True) as process:
        for line in process.stdout or ():
            result = json.loads(line)
            good = max(result["loss"], result["gradient"]) < bound and result["exact_slots"]
            bad += not good
            print("ok " if good else "BAD", result["case"], f"loss {result['loss']:.1e}",
                  f"gradient {result['gradient']:.1e} at {result['worst']}", flush=True)  # fmt: skip
    return int(bool(bad or process.returncode))


if __name__ == "__main__":
    sys.exit(main())
