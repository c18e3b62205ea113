"""Reports of compiled programs against numbers by hand, on 2 x 2 x 2 emulated devices."""

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from glm_jax.config import resolve
from glm_jax.errors import UserError
from glm_jax.planning import targets, worker
from glm_jax.planning.compile import Memory, Report, Request, exhausted, verdict
from glm_jax.planning.programs import Inference
from tests.patience import HANG
from tests.planning.compiled import EXPERIMENT

ROOT = Path(__file__).parents[2]
# elements on a device whose layers are padded to 2 a stage: of each block norms and biases [64] or split over `tensor`
SPLIT = 2 * (64 * 2 * 3 * 16 + 2 * 16 * 64 + 64 * 2 * 64 + 64 * 64 + 4 * 64 + 2 * 64) + 16384 // 4 * 64 + 2 * 64
WHOLE = 2 * (2 * 3 * 16 + 2 * 64)  # biases of heads and features, which `data` does not split


@cache
def lines() -> list[Any]:
    """Compile everything, once."""
    environment = targets.environment(targets.find("cpu"), 8)
    command = [sys.executable, "-m", "tests.planning.compiled"]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


def report(number: int) -> Report:
    """Return one of the reports."""
    return Report.from_json(lines()[number])


@pytest.mark.slow
def test_what_a_step_communicates() -> None:
    found = report(0).collectives
    sizes = {(one.kind, one.axes): one.bytes for one in found if not one.loops}
    assert sizes["all-gather", "data"] == sizes["reduce-scatter", "data"] == 4 * SPLIT
    assert not [one for one in found if one.loops and "data" in one.axes]
    (sends,) = [one for one in found if one.kind == "collective-permute" and one.loops]
    assert sends.axes == "pipeline" and sends.loops == (4 + 2,) and sends.count == 2  # M + 2 (P - 1) ticks
    assert sends.bytes == 2 * 4 * (2 * 32 // 2 * 64)  # two rows a device, S / tensor tokens


@pytest.mark.slow
def test_what_a_step_computes_and_sends_by_hand() -> None:
    found = report(0).counted
    assert found is not None
    tokens, layers, ticks = 2 * 32, 2, 4 + 2
    kernels = 64 * 2 * 3 * 16 + 2 * 16 * 64 + 64 * 2 * 64 + 64 * 64  # of a block, split over `tensor`
    scores = 2 * 32 * 2 * 16  # of a token: two heads of 16, with all 32 keys, and their sums of values
    # forward, again without the last product, and twice as much backward; logits in each tick, and two gradients
    of_blocks = 4 * layers * tokens * 2 * (4 * (kernels + scores) - 64 * 64)
    assert found.flops == pytest.approx(of_blocks + ticks * 3 * tokens * 2 * 64 * 16384 // 4, rel=1e-3)
    row = 4 * tokens * 64  # bytes of the residual stream; in and out of two sublayers, and of embedding and head
    assert found.sent["tensor"] == pytest.approx((4 * layers * 11 + ticks * 4) * row / 2, rel=3e-3)  # and norms
    # messages, each to a neighbour; sums of four shards of tokens over two stages, there and back
    assert found.sent["pipeline"] == pytest.approx(ticks * (2 + 4) * row / 2, rel=1e-3)


@pytest.mark.slow
def test_what_a_step_holds() -> None:
    memory = report(0).memory
    state = 3 * 4 * (SPLIT // 2 + WHOLE)
    rows = memory.arguments - state if memory.arguments else 0
    assert 0 < rows < 4 * 2 * 32 * 40 + 1000  # 40 bytes a token are more than there are
    assert memory.outputs is not None and memory.outputs < 2000  # metrics: the state takes the place of the old one
    assert memory.peak == (memory.arguments or 0) + memory.outputs + (memory.temporaries or 0)


@pytest.mark.slow
def test_arrays_have_the_lines_that_make_them() -> None:
    found = {(one.shape, one.operation, one.function): one for one in report(0).buffers}
    gathered = found["f32[4096,64]", "all_gather", "gather > _gather"]
    assert gathered.bytes == 4096 * 64 * 4 and gathered.count == 1
    name, line = gathered.line.split(":")
    assert name == "parallel/zero.py"
    assert "lax.all_gather" in (ROOT / "glm_jax" / name).read_text().splitlines()[int(line) - 1]
    state = {operation for _, operation, function in found if not function}
    assert "state.params['blocks']['attention']['qkv']['kernel']" in state
    stash = {shape for shape, _, function in found if function == "Stage.empty_stash > zeros"}
    assert stash == {"f32[6,2,16,64]"}  # 2 layers of each of 2 (P - 1) + 1 microbatches


@pytest.mark.slow
def test_adapters_are_compiled_beside_a_base() -> None:
    base, whole = report(1).memory.arguments, report(0).memory.arguments
    assert base and whole and 4 * (SPLIT // 2 + WHOLE) < base < whole - 4 * SPLIT // 2


@pytest.mark.slow
def test_fewer_bits_take_less() -> None:
    kernels = 2 * (64 * 2 * 3 * 16 + 2 * 16 * 64 + 64 * 2 * 64 + 64 * 64)  # on a device
    half, eight, four = (report(number).memory.arguments or 0 for number in (2, 3, 4))
    scales = 2 * 4 * 4 * (2 * 3 * 16 + 64 + 2 * 64 + 64)  # at most: four bytes, for some kernels two groups
    assert 0 <= eight - (half - kernels) <= scales
    assert eight - four == kernels // 2


def test_requests_survive_json() -> None:
    request = Request(EXPERIMENT, "cpu", (Path("mine.toml"),), 7, "decode", Inference("int4", 32, group=64))
    assert Request.from_json(json.loads(json.dumps(request.to_json()))) == request


def test_a_refused_program_never_fits() -> None:
    bare = Report("v5e:2x2", "step", {}, Memory(10, 1, 1, 8), (), (), None, 0.0, 0.0, 0, "")
    assert verdict(bare, 10).fits and not verdict(bare, 9).fits and verdict(bare, 9).margin == -1
    refused = Report("v5e:2x2", "step", {}, Memory(10), (), (), None, 0.0, 0.0, 0, "")
    assert not verdict(refused, 11).fits


def test_what_a_compiler_refuses_is_read_from_its_words() -> None:
    used = "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    used += "Used 20.99G of 15.75G hbm."
    total = "RESOURCE_EXHAUSTED: E1000: Ran out of memory on HBM, the total memory required for HLO temporaries "
    total += "(512.5M) exceeds available HBM (500.00M)."
    assert exhausted(used) == int(20.99 * 2**30) and exhausted(total) == int(512.5 * 2**20)
    assert exhausted("INTERNAL: Used 20.99G of 15.75G hbm") is None


def test_a_mesh_without_a_size_is_refused() -> None:
    request = Request(resolve({}, {"mesh.tensor": -1}))
    with pytest.raises(UserError, match=r"mesh.tensor is -1, .* such as --config.mesh.tensor=8"):
        list(worker.reports([request]))


@pytest.mark.slow
def test_a_process_says_why_it_cannot_compile() -> None:
    request = Request(resolve({}, {"mesh.tensor": 3}))
    with pytest.raises(UserError, match=r"^mesh.tensor=3 does not divide "):
        list(worker.reports([request]))
