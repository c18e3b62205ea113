"""Runs the tests of the step on meshes of emulated devices, each in its own process, which an XLA abort would kill."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.patience import HANG

pytestmark = pytest.mark.slow


@pytest.mark.parametrize("mesh, tests", [("2,1,2", "test_step.py"), ("2,2,2", "test_groups.py")])
def test_the_step_passes_the_same_tests_on_a_mesh(mesh: str, tests: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(Path(__file__).parent / tests)],
        env={**os.environ, "GLM_JAX_TEST_MESH": mesh, "JAX_NUM_CPU_DEVICES": "8"},
        capture_output=True,
        text=True,
        timeout=HANG,
    )
    assert done.returncode == 0, done.stdout[-5000:]
    assert " passed" in done.stdout and "failed" not in done.stdout
