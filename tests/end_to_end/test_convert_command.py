"""`glm-jax convert`, there and back, and the presets that it reads."""

import json
import os
import runpy
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np
import pytest

from glm_jax.cli import main
from glm_jax.config import resolve
from glm_jax.data.tokenizers.load import read
from glm_jax.data.tokenizers.sentencepiece import train
from glm_jax.interop import huggingface, sat
from glm_jax.model import GLMConfig, init
from tests.data import vocabularies
from tests.end_to_end.runs import in_process

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
    there = glm_jax("convert", "sat-to-orbax", *config, "--path", GOLDENS / "ckpt_tp1", "--out", tmp_path / "ours")
    assert there.returncode == 0, there.stderr
    assert sorted(os.listdir(tmp_path / "ours")) == ["checkpoints", "config.json"]
    back = glm_jax("convert", "orbax-to-sat", "--path", tmp_path / "ours", "--out", tmp_path / "sat",
                   "--tensor_parallel=4")  # fmt: skip
    assert back.returncode == 0, back.stderr
    before, after = sat.read_tensors(GOLDENS / "ckpt_tp1"), sat.read_tensors(tmp_path / "sat")
    assert before.keys() == after.keys()
    for name, array in before.items():
        np.testing.assert_array_equal(array, after[name])
    asked = glm_jax("generate", "--workdir", tmp_path / "ours", "--prompt", "a [MASK]")
    assert asked.returncode == 2 and asked.stderr.count("\n") == 1 and "--tokenizer FILE" in asked.stderr


@in_process
def test_two_commands_from_official_files_to_a_filled_blank(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "mine.model").write_bytes(train(["the small array returns a new shape", "天下大势"] * 20, 330))
    cfg = GLMConfig(1, 24, 2, 32, 336)
    sat.save(tmp_path / "sat", cfg, init(cfg, jax.random.key(0)), tensor_parallel=1, iteration=7)
    (tmp_path / "sat/model_config.json").write_text('{"num_attention_heads": 2, "max_sequence_length": 64}')
    monkeypatch.chdir(tmp_path)
    assert main.main(["convert", "sat-to-orbax", "--path=sat", "--out=ours", "--tokenizer=mine.model"]) == 0
    assert main.main(["generate", "--workdir=ours", "--prompt=the small [MASK] shape", "--max_tokens=3"]) == 0
    said = capsys.readouterr()
    assert said.err == "written: ours\n"
    assert said.out.startswith("the small ") and said.out.endswith(" shape\n") and "MASK" not in said.out
    moved = ["--config.model.num_layers=2", "--config.data.seq_length=32"]
    assert main.main(["convert", "orbax-to-sat", "--path=ours", "--out=back", *moved]) == 2
    assert "ours holds a model with num_layers 1, not model.num_layers=2" in capsys.readouterr().err


@pytest.mark.parametrize("files", [vocabularies.word_piece, vocabularies.roberta, vocabularies.library_file])
def test_two_commands_from_a_hugging_face_folder_to_a_filled_blank(
    files: Callable[[Path], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tokenizer lies in the folder, and the workdir needs the folder no more."""
    (tmp_path / "made").mkdir()
    pieces = read(files(tmp_path / "made"), pinned=False).size
    cfg = GLMConfig(1, 16, 2, 64, pieces + 6, 33, norm="pre", position="learned_2d", activation="gelu")
    huggingface.save(tmp_path / "glm", cfg, init(cfg, jax.random.key(0)))
    shutil.copytree(tmp_path / "made", tmp_path / "glm", dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    assert main.main(["convert", "hf-to-orbax", "--path=glm", "--out=ours"]) == 0
    assert main.main(["convert", "orbax-to-hf", "--path=ours", "--out=back"]) == 0
    for left, right in zip(*(jax.tree.leaves(huggingface.load(name, cfg)) for name in ("glm", "back")), strict=True):
        np.testing.assert_array_equal(left, right)
    shutil.rmtree("glm")
    assert main.main(["generate", "--workdir=ours", "--prompt=the small [MASK] shape", "--max_tokens=3"]) == 0
    said = capsys.readouterr()
    assert said.out.startswith("the small") and said.out.endswith(" shape\n") and "MASK" not in said.out
    assert said.err == "written: ours\nwritten: back\n"


@in_process
@pytest.mark.parametrize(
    "arguments, problem",
    [
        (["sat-to-orbax"], "does not show its num_heads: give --config.model.num_heads=VALUE"),
        (["sat-to-orbax", "--config=glm_130b"], "holds a model with num_layers 3, not model.num_layers=70"),
        (["orbax-to-sat", "--config.model.num_heads=4"], "is for `convert sat-to-orbax`, not for orbax-to-sat"),
        (["sat-to-orbax", "--config.model.num_heads=4", "--tokenizer=missing"], "cannot read the tokenizer missing"),
        (
            ["sat-to-orbax", "--config.model.num_heads=4", "--tokenizer=large"],
            "model.vocab_size 256 is less than the tokenizer's",
        ),
        (["sat-to-orbax", "--config.model.num_heads=4", "--out=large"], "large exists already"),
        (["sat-to-orbax", "--config.model.num_heads=4", "--out=large/out"], "--out large/out (File exists)"),
        (["sat-to-orbax", "--config.model.num_heads=4", "--path=large"], "large holds no weights"),
    ],
)
def test_refusals_are_one_line_and_write_nothing(
    arguments: list[str], problem: str, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("large").write_bytes(train(["the small array returns a new shape", "天下大势"] * 20, 330))
    before = Path("large").read_bytes()
    assert main.main(["convert", arguments[0], f"--path={GOLDENS / 'ckpt_tp1'}", "--out=out", *arguments[1:]]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[-1].startswith("error: ") and problem in lines[-1] and len(lines) == 1, lines
    assert os.listdir() == ["large"] and Path("large").read_bytes() == before
