"""A checkpoint is the same whatever mesh wrote it, and restores bit for bit under any other."""

import json
import subprocess
import sys
from pathlib import Path


def test_checkpoints_pass_between_meshes_and_another_shape_is_named(tmp_path: Path) -> None:
    script = Path(__file__).parent / "checkpoint_cases.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path)], capture_output=True, text=True, timeout=500
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kind, message = json.loads(done.stdout)
    assert kind == "UserError" and "does not fit this config" in message and "\n" not in message
