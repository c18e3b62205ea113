"""The engine on meshes of emulated devices, against autodiff on one and numpy. Each group runs in one subprocess."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from tests.patience import HANG

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
BLOCKS = {"attention": "blockwise"}
QK_NORM = {"qk_norm": True, "hidden_size": 32}  # four entries a head: a norm over two is a sign
DROPOUT = {"attention_dropout": 0.2, "hidden_dropout": 0.2}

# Every factorisation of 8 devices, with schedules, stashes and the options of a model spread over them. For all 40
# combinations of mesh, schedule and stash see tests/proofs/parity_matrix.py.
KINDS: list[dict[str, Any]] = [  # each axis alone, and all of them
    {"mesh": [1, 1, 8], "engine": {"schedule": "gpipe", **BLOCKS}, "model": QK_NORM},
    {"mesh": [1, 8, 1], "engine": {"keep": "all"}, "model": {"num_layers": 9, **DROPOUT}, "microbatches": 8},
    {"mesh": [8, 1, 1], "model": DROPOUT},
    {"mesh": [2, 2, 2], "engine": BLOCKS, "model": {"norm": "pre", "position": "alibi", "activation": "gelu_tanh"}},
]
OTHERS: list[dict[str, Any]] = [
    {"mesh": [1, 2, 4], "engine": {"normalization": "microbatch"}, "model": {"position": "learned_2d"}},
    {"mesh": [1, 4, 2], "engine": {"keep": "stage"}, "model": {"num_layers": 7, **DROPOUT}, "microbatches": 4},
    {"mesh": [2, 1, 4], "engine": {"keep": "products", **BLOCKS}, "model": {"norm": "sandwich", **DROPOUT}},
    {"mesh": [2, 4, 1], "engine": {"schedule": "gpipe", "keep": "stage"}, "model": {"num_layers": 5, "norm": "post"}},
    {"mesh": [4, 1, 2], "engine": {"keep": "products"}, "model": {"embedding_norm": True, **QK_NORM}},
    {"mesh": [4, 2, 1], "engine": {"schedule": "gpipe", "z_loss": 0.1}, "model": DROPOUT},
    {"mesh": [4, 1, 2], "engine": {"zero": 3}, "model": {**QK_NORM, **DROPOUT}},
    {"mesh": [1, 1, 1], "model": DROPOUT},
]
FLOAT64: list[dict[str, Any]] = [
    {"mesh": [2, 2, 2], "engine": {"z_loss": 0.1}, "model": {**QK_NORM, **DROPOUT}, "x64": True},
    {"mesh": [1, 4, 2], "engine": BLOCKS, "model": {"num_layers": 7, "pb_relax": 128.0}, "x64": True},
]
HALF: list[dict[str, Any]] = [{"mesh": [2, 2, 2], "engine": {"compute": name}} for name in ("float16", "bfloat16")]
HALF += [{"mesh": [4, 1, 2], "engine": {"compute": "float16", "zero": 3}}]


def run_module(module: str, *arguments: str) -> list[Any]:
    """Run a test module in its own process, which may set its number of devices."""
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-W", "error", "-m", f"tests.parallel.{module}", *arguments]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=HANG, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@cache
def results(group: str) -> list[Any]:
    """Run a group of cases, once."""
    cases = {"kinds": KINDS, "others": OTHERS, "float64": FLOAT64, "half": HALF}[group]
    return run_module("parity", json.dumps(cases))


def name(case: dict[str, Any]) -> str:
    return "x".join(map(str, case["mesh"]))


FLOAT32 = [pytest.param("kinds", i, id=name(case), marks=pytest.mark.oldest) for i, case in enumerate(KINDS)]
FLOAT32 += [pytest.param("others", i, id=name(case)) for i, case in enumerate(OTHERS)]


@pytest.mark.parametrize("group, index", FLOAT32)
def test_losses_of_five_steps_and_first_gradients_are_those_of_one_device(group: str, index: int) -> None:
    result = results(group)[index]
    assert result["loss"] < 1e-5 and result["gradient"] < 1e-5, result
    assert result["token_losses"] < 1e-5, result
    assert result["numpy_loss"] < 1e-5 and result["numpy_slope"] < 1e-5, result
    assert result["exact_slots"], result


@pytest.mark.parametrize("index", range(len(FLOAT64)), ids=[name(case) for case in FLOAT64])
def test_five_steps_in_float64_are_those_of_one_device(index: int) -> None:
    result = results("float64")[index]
    assert result["loss"] < 1e-9 and result["later_gradient"] < 1e-9, result
    assert result["numpy_loss"] < 1e-9 and result["numpy_slope"] < 1e-6, result


@pytest.mark.oldest
@pytest.mark.parametrize("index, bound", [(0, 0.01), (1, 0.1), (2, 0.01)], ids=["float16", "bfloat16", "zero3"])
def test_half_precision_differs_by_rounding_alone(index: int, bound: float) -> None:
    result = results("half")[index]
    assert result["loss"] < bound / 50 and result["gradient"] < bound, result


@cache
def compiled() -> dict[str, Any]:
    """Compile the engine and return the facts about its programs, once."""
    return run_module("compiled")[0]


def test_memory_of_1f1b_does_not_grow_with_microbatches() -> None:
    few, many = compiled()["1f1b"]["4"], compiled()["1f1b"]["64"]
    assert abs(many - few) < 0.01 * few
    few, many = compiled()["gpipe"]["4"], compiled()["gpipe"]["64"]
    assert many > 2 * few


def test_nothing_is_reduced_over_data_inside_the_loop() -> None:
    inside, outside = compiled()["collectives"]["inside"], compiled()["collectives"]["outside"]
    assert not [axes for axes in inside if "data" in axes], inside
    assert inside["tensor"] and inside["pipeline"] and inside["pipeline+tensor"]  # the reader of HLO finds them
    assert outside["data"]
