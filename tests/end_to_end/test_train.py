"""Text in, a trained GLM out, as a person does it: train, stop, go on, generate, on one device and on a mesh."""

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Cli = Callable[..., subprocess.CompletedProcess[str]]


def events(workdir: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Read the events of one kind, by step, less what depends on the clock."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    clock = ("tokens_per_second", "mfu", "hfu", "data_wait")
    found: dict[int, dict[str, Any]] = {}
    for event in map(json.loads, lines):
        if event.pop("event") == kind:
            assert event["step"] not in found
            found[event["step"]] = {key: value for key, value in event.items() if key not in clock}
    return found


@pytest.fixture(scope="module")
def finished(experiment: Path, glm_jax: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny experiment to the end."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    done = glm_jax("train", "--config", experiment, "--workdir", workdir)
    assert done.returncode == 0, done.stderr
    assert "filled" in done.stdout
    return workdir


def test_a_run_leaves_everything_in_its_workdir(finished: Path) -> None:
    assert {path.name for path in finished.iterdir()} == {
        "config.json",
        "checkpoints",
        "metrics.jsonl",
        "tensorboard",
        "tokenizer.model",
    }
    assert list((finished / "tensorboard").iterdir())
    train, evaluation = events(finished, "train"), events(finished, "evaluation")
    assert list(train) == list(range(1, 13)) and list(evaluation) == [0, 6, 12]
    assert set(train[1]) == {"step", "samples", "tokens", "loss", "lr", "grad_norm", "loss_scale", "skipped"} | {
        key for key in train[1] if key.startswith("loss/")
    }
    assert {key for event in train.values() for key in event if key.startswith("loss/")} == {"loss/mask", "loss/gmask"}
    assert set(evaluation[0]) == {"step", "loss", *(f"{kind}/{name}" for kind in ("loss", "bits_per_byte")
                                                    for name in ("en", "zh"))}  # fmt: skip
    assert evaluation[0]["loss"] == pytest.approx(6.17, rel=0.1)  # ln 480
    assert evaluation[12]["loss"] < 0.9 * evaluation[0]["loss"]
    assert train[12]["samples"] == 96 and train[1]["lr"] == pytest.approx(0.005)


def test_the_same_command_again_says_that_it_is_done(finished: Path, experiment: Path, glm_jax: Cli) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = glm_jax("train", "--config", experiment, "--workdir", finished)
    assert again.returncode == 0 and "finished" in again.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


def test_stopping_saves_and_going_on_repeats_the_uninterrupted_run(
    finished: Path, experiment: Path, environment: dict[str, str], glm_jax: Cli, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    arguments = ["train", "--config", str(experiment), "--workdir", str(workdir)]
    process = subprocess.Popen(
        [sys.executable, "-m", "glm_jax", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + 240
    while time.monotonic() < deadline and process.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and '"step": 2,' in metrics.read_text(encoding="utf-8"):
            process.send_signal(signal.SIGINT)
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=240)
    assert process.returncode == 3, said
    assert "the same command goes on from there" in said.splitlines()[-1]
    assert 2 <= max(events(workdir, "train")) < 12
    assert glm_jax(*arguments).returncode == 0
    assert events(workdir, "train") == events(finished, "train")
    assert events(workdir, "evaluation") == events(finished, "evaluation")


def test_a_run_may_begin_on_a_mesh_of_eight_devices_and_end_on_one(
    finished: Path, experiment: Path, glm_jax: Cli, tmp_path: Path
) -> None:
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run"]
    mesh = ["--config.mesh.data=2", "--config.mesh.pipeline=2", "--config.mesh.tensor=2"]  # 3 layers over 2 stages
    until = ["--config.train.steps=6", "--config.optimizer.decay_samples=96"]
    done = glm_jax(*arguments, *mesh, *until, devices=8)
    assert done.returncode == 0, done.stderr
    assert glm_jax(*arguments).returncode == 0
    for kind in ("train", "evaluation"):
        alone, together = events(finished, kind), events(tmp_path / "run", kind)
        assert alone.keys() == together.keys()
        for step, event in alone.items():
            assert event == pytest.approx(together[step], rel=1e-4)


def test_short_rows_train_and_a_damaged_checkpoint_is_named(glm_jax: Cli, experiment: Path, tmp_path: Path) -> None:
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run", "--config.data.seq_length=32"]
    done = glm_jax(*arguments, "--config.train.steps=2", "--config.train.eval_every=0")
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "2" / "params")
    for damaged in (glm_jax(*arguments), glm_jax("generate", "--workdir", tmp_path / "run", "--prompt", "[MASK]")):
        assert damaged.returncode == 2 and "2 is damaged" in damaged.stderr.splitlines()[-1], damaged.stderr


@pytest.mark.parametrize("strategy", ["greedy", "sample"])
def test_generate_fills_blanks_and_repeats_itself(finished: Path, glm_jax: Cli, strategy: str) -> None:
    arguments = ["generate", "--workdir", finished, "--prompt", "The small [MASK] of a model, [MASK].",
                 "--strategy", strategy, "--max_tokens", "5"]  # fmt: skip
    first, second = glm_jax(*arguments), glm_jax(*arguments)
    assert first.returncode == 0, first.stderr
    assert first.stdout == second.stdout
    assert first.stdout.startswith("The small ") and "MASK" not in first.stdout and " of a model, " in first.stdout


def test_another_run_of_the_same_command_gives_the_same_numbers_and_config_may_change_on_resume(
    finished: Path, experiment: Path, glm_jax: Cli, tmp_path: Path
) -> None:
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run"]
    assert glm_jax(*arguments, "--config.train.steps=4", "--config.optimizer.decay_samples=96").returncode == 0
    assert glm_jax(*arguments, "--config.train.log_every=4").returncode == 0  # everything not frozen may change
    train = events(tmp_path / "run", "train")
    assert list(train) == [1, 2, 3, 4, 8, 12]
    assert train == {step: event for step, event in events(finished, "train").items() if step in train}
