"""The paper's run, compiled from shapes for 768 emulated devices."""

from pathlib import Path

import pytest

from glm_jax.config import files, resolve
from glm_jax.planning import worker
from glm_jax.planning.compile import Request

pytestmark = pytest.mark.slow

EXPERIMENT = Path(__file__).parents[2] / "experiments" / "glm_130b.py"


def test_a_whole_step_of_glm_130b_compiles_and_fits() -> None:
    (report,) = worker.reports([Request(resolve(files.config(EXPERIMENT)))])
    assert report.memory.peak < 38e9  # more than for a GPU, because XLA fuses less for CPUs
    inside = {one.axes for one in report.collectives if one.loops}
    assert "tensor" in inside and not any("data" in axes for axes in inside), report.collectives
    ticks = {one.loops[0] for one in report.collectives if "pipeline" in one.axes and one.loops}
    assert 176 + 2 * 7 in ticks  # M + 2 (P - 1)


def test_the_layers_of_glm_130b_are_padded_and_cut_in_a_small_part_of_a_device() -> None:
    """Saving holds the state, 2.1 GB, with its true layers and on the way between: no device ever has a whole array."""
    (report,) = worker.reports([Request(resolve(files.config(EXPERIMENT)), program="save")])
    assert report.memory.peak < 6.5e9
    assert {(one.axes, one.loops) for one in report.collectives} == {("pipeline", ())}
