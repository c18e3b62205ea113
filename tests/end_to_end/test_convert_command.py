"""`glm-jax convert`, there and back, and the presets that it reads."""

import json
import runpy
import subprocess
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glm_jax.config import resolve
from glm_jax.interop import sat
from glm_jax.model import GLMConfig

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]

GOLDENS = Path(__file__).parent.parent / "goldens" / "glm130b"
PUBLISHED = {
    "glm_110m": 110e6,
    "glm_335m": 335e6,
    "glm_doc": 335e6,
    "glm_410m": 410e6,
    "glm_515m": 515e6,
    "glm_10b": 10e9,
    "glm_10b_chinese": 10e9,
    "glm_130b": 128_697_794_560,
}


def preset(name: str) -> GLMConfig:
    resolved = resolve(runpy.run_path(f"experiments/{name}.py")["get_config"]())
    return resolved.glm(0)


@pytest.mark.parametrize("name", PUBLISHED)
def test_presets_have_their_published_size(name: str) -> None:
    assert preset(name).num_parameters == pytest.approx(PUBLISHED[name], rel=0 if name == "glm_130b" else 0.02)


def test_glm_2b_is_named_by_rounding() -> None:
    assert preset("glm_2b").num_parameters == pytest.approx(1.92e9, rel=0.005)


@pytest.fixture
def config() -> list[str]:
    shape = json.loads((GOLDENS / "config.json").read_text())
    flags = [
        f"--config.model.{key}={shape[name]}"
        for key, name in (
            ("num_layers", "num_layers"),
            ("hidden_size", "hidden_size"),
            ("num_heads", "num_attention_heads"),
            ("ffn_size", "inner_hidden_size"),
            ("vocab_size", "vocab_size"),
        )
    ]
    return ["--config", "experiments/glm_130b.py", *flags]


@pytest.mark.oldest
def test_convert_there_and_back(glm_jax: Cli, config: list[str], tmp_path: Path) -> None:
    there = glm_jax("convert", "sat-to-orbax", *config, "--path", GOLDENS / "ckpt_tp1", "--out", tmp_path / "orbax")
    assert there.returncode == 0, there.stderr
    ways = ["--path", tmp_path / "orbax", "--out", tmp_path / "sat"]
    back = glm_jax("convert", "orbax-to-sat", *config, *ways, "--tensor_parallel=4")
    assert back.returncode == 0, back.stderr
    before, after = sat.read_tensors(GOLDENS / "ckpt_tp1"), sat.read_tensors(tmp_path / "sat")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])


def test_a_checkpoint_of_another_shape_is_refused(glm_jax: Cli, tmp_path: Path) -> None:
    arguments = ["--config", "experiments/glm_130b.py", "--path", GOLDENS / "ckpt_tp1", "--out", tmp_path / "out"]
    done = glm_jax("convert", "sat-to-orbax", *arguments)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert "mp_rank_00" in done.stderr or "transformer." in done.stderr
    assert not (tmp_path / "out").exists()


def test_a_place_that_cannot_be_written_is_one_line(glm_jax: Cli, config: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    out = tmp_path / "file" / "out"
    done = glm_jax("convert", "sat-to-orbax", *config, "--path", GOLDENS / "ckpt_tp1", "--out", out)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert done.stderr.startswith("error: --path") and f"--out {out} ([Errno 20] Not a directory" in done.stderr
    assert (tmp_path / "file").read_bytes() == b""
