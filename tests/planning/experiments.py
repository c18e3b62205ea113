"""What plans are held against: GLM-130B's experiment, and small programs that are compiled."""

import json
import os
import runpy
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from glm_jax.config import Config
from tests.patience import HANG

ROOT = Path(__file__).parents[2]
FILE = ROOT / "experiments" / "glm_130b.py"


def glm_130b() -> Config:
    """Return the config of experiments/glm_130b.py, unresolved."""
    return runpy.run_path(str(FILE))["get_config"]()


def peaks(script: str, grid: Sequence[Mapping[str, Any]]) -> list[list[int]]:
    """Return bytes as estimated and as compiled for each set of changes, by a script of this folder."""
    command = [sys.executable, f"tests/planning/{script}", json.dumps(grid)]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(found) == len(grid)
    return found
