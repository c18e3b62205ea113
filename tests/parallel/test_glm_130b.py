"""The paper's run, compiled (tests/proofs/compile_130b.py), and the reader of compiled programs that it needs."""

import subprocess
import sys
from pathlib import Path

import pytest

from tests.parallel import hlo
from tests.patience import HANG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize(
    "notation, axes",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}", "pipeline"),
        ("replica_groups=[2,4]<=[8]", "pipeline+tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "data"),
    ],
)
def test_axes_of_a_collective_are_read_from_every_notation(notation: str, axes: str) -> None:
    assert hlo.axes_of(f"%x = f32[] all-reduce(%y), {notation}, channel_id=1", (2, 2, 2)) == axes


def test_a_whole_step_of_glm_130b_compiles_and_fits() -> None:
    command = [sys.executable, "tests/proofs/compile_130b.py", "--target", "cpu"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    inside = done.stdout.split("in the tick loop ")[1].split(", outside")[0]
    assert "tensor" in inside and "data" not in inside, done.stdout


def test_the_layers_of_glm_130b_are_padded_and_cut_in_a_small_part_of_a_device() -> None:
    """Saving holds the state, 2.1 GB, with its true layers and on the way between: no device ever has a whole array."""
    command = [sys.executable, "tests/proofs/compile_130b.py", "--program", "save", "--bound", "6.5"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert "in the tick loop {}, outside {'pipeline': " in done.stdout, done.stdout
