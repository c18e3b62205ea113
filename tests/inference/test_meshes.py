"""A mesh changes nothing in what is generated, moves no weight, and leaves no stage idle once all are at work."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.inference.batch import SHARES
from tests.inference import tiny
from tests.inference.meshes import INT4, JOBS, OPTIONS, TURNS
from tests.parallel.test_mesh import free_port

ROOT = Path(__file__).parent.parent.parent
HANG = 600  # seconds


def run(count: int) -> list[dict[str, Any]]:
    """Run tests/inference/meshes.py in `count` processes and return what the first one prints."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.inference.meshes", str(free_port()), str(count)]
    started = [subprocess.Popen([*command, str(index)], cwd=ROOT, env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for index in range(count)]  # fmt: skip
    outputs = [process.communicate(timeout=HANG) for process in started]
    assert [process.returncode for process in started] == [0] * count, [error[-2000:] for _, error in outputs]
    return [json.loads(line) for line in outputs[0][0].splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def reports() -> list[dict[str, Any]]:
    return run(1)


def same(report: dict[str, Any], other: dict[str, Any]) -> None:
    assert report["tokens"] == other["tokens"]
    np.testing.assert_allclose(report["scores"], other["scores"], atol=2e-3)


@pytest.mark.slow
def test_every_mesh_gives_the_tokens_of_whole_rows_on_one_device(reports: list[dict[str, Any]]) -> None:
    assert [tuple(report["mesh"]) for report in reports] == [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)]
    for report in reports[1:]:
        same(report, reports[0])
    one, several = (report["int4"] for report in reports if tuple(report["mesh"]) in INT4)
    assert one == several != reports[0]["tokens"]["row"]
    for name, options in OPTIONS.items():
        expected = [tiny.recomputed(tiny.DEEP, tiny.job(number, TURNS, options[number])) for number in range(2)]
        assert reports[0]["tokens"][name][:2] == [[one.tokens for one in found] for found in expected]


@pytest.mark.slow
def test_two_processes_give_the_same(reports: list[dict[str, Any]]) -> None:
    (two,) = run(2)
    assert two["mesh"] == [2, 2, 2]
    same(two, reports[0])


@pytest.mark.slow
def test_stages_are_idle_only_until_the_pipeline_is_full(reports: list[dict[str, Any]]) -> None:
    for report in reports:
        stages = report["mesh"][1]
        groups = min(stages, JOBS)  # as many batches in flight as stages
        work = TURNS * groups
        assert report["busy"] == [work] * stages  # each stage works on each token of each group
        assert report["ticks"] - work == stages - 1  # and waits P - 1 ticks in all, however many tokens there are


@pytest.mark.slow
def test_no_weight_is_moved_for_a_token(reports: list[dict[str, Any]]) -> None:
    """A token moves the residual stream, rows x D, and the logits that it is chosen from, rows x V."""
    cfg = tiny.DEEP
    smallest = cfg.hidden_size * cfg.hidden_size // 4  # what a member of `tensor` holds of the smallest kernel
    for report in reports[1:3]:  # in the others every device has the whole model
        data, pipeline, _ = report["mesh"]
        rows = next(share for share in SHARES if share * data * pipeline >= JOBS)
        moved = report["collectives"]
        assert rows * cfg.hidden_size < smallest and not {"reduce-scatter", "all-to-all"} & moved.keys()
        assert moved["all-gather"] == rows * cfg.vocab_size
        assert moved["all-reduce"] == moved["collective-permute"] == rows * cfg.hidden_size
