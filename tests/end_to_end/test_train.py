"""From text to a trained GLM, as a user does it: train, stop, resume, generate, on one device and on a mesh."""

import json
import math
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.patience import HANG
from tests.proofs import kills

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]


def events(workdir: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Return the events of one kind, by step, without what depends on the clock."""
    return {step: event for (of, step), event in kills.events(workdir).items() if of == kind}


def numbers(event: dict[str, Any]) -> list[float]:
    """Return the numbers of an event, including those in lists."""
    lists = (value if isinstance(value, list) else [value] for key, value in event.items() if key != "event")
    return [number for values in lists for number in values]


@pytest.fixture(scope="module")
def finished(experiment: Path, environment: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train the tiny experiment as a scheduler might: without HOME and TERM, stdin closed, an odd path."""
    workdir = tmp_path_factory.mktemp("finished") / "a run & 训练 [1]"
    bare = {name: value for name, value in environment.items() if name not in ("HOME", "TERM", "LANG", "LC_ALL")}
    command = [sys.executable, "-m", "glm_jax", "train", "--config", str(experiment), "--workdir", str(workdir)]
    done = subprocess.run(
        ["sh", "-c", '"$@" <&-', "sh", *command],
        env={**bare, "JAX_NUM_CPU_DEVICES": "1"}, capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    said = done.stderr.splitlines()
    assert said[0].startswith("devices: 1 x cpu (cpu), jax ") and "compiling the training step" in said
    progress = [line for line in said if re.match(r"\d\d:\d\d:\d\d step \d+/12, loss ", line)]
    assert len(progress) == 12 and "\r" not in done.stderr
    assert "filled" in done.stdout
    return workdir


@pytest.mark.oldest
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
    counters = ("event", "step", "samples", "batch", "tokens", "skipped")
    norms = ("grad_norm", "param_norm", "update_norm", "grad_norm/embedding", "grad_norm/final_norm",
             *(f"grad_norm/blocks_{layer}_{layer}" for layer in range(3)), "activation_rms")  # fmt: skip
    losses = {key for event in train.values() for key in event if key.startswith("loss/")}
    assert losses == {"loss/mask", "loss/gmask"}
    assert set(train[1]) - losses == {*counters, *norms, "loss", "lr", "embedding_shrink", "loss_scale"}
    assert len(train[1]["activation_rms"]) == 3 and all(value > 0 for value in train[1]["activation_rms"])
    written = [json.loads(line) for line in (finished / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    assert all(event.keys() > kills.CLOCK for event in written if event["event"] == "train")
    fills = [event for event in written if event["event"] == "fill"]
    assert [event["source"] for event in fills] == ["en"] * 3 + ["zh"] * 3 and written[-6:] == fills
    for event in fills:
        assert event["step"] == 12 and "[MASK]" in event["text"] and event["target"] and "filled" in event
    saves = [event for event in written if event["event"] == "checkpoint"]
    assert [event["step"] for event in saves] == [5, 10, 12]
    assert all(0 < event["blocked_seconds"] <= event["seconds"] and event["bytes"] > 10**5 for event in saves)
    assert set(evaluation[0]) == {"event", "step", "loss", *(f"{kind}/{name}" for kind in ("loss", "bits_per_byte")
                                                    for name in ("en", "zh"))}  # fmt: skip
    assert evaluation[0]["loss"] == pytest.approx(6.17, rel=0.1)  # ln 480
    assert evaluation[12]["loss"] < 0.9 * evaluation[0]["loss"]
    assert train[12]["samples"] == 96 and train[1]["lr"] == pytest.approx(0.005)


def test_the_same_command_again_says_that_it_is_done(finished: Path, experiment: Path, glm_jax: Cli) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    again = glm_jax("train", "--config", experiment, "--workdir", finished)
    assert again.returncode == 0 and "finished" in again.stderr
    assert (finished / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("number, save_every", [(signal.SIGINT, 1000), (signal.SIGUSR1, 1)])
def test_stopping_saves_and_resuming_repeats_the_uninterrupted_run(
    number: int,
    save_every: int,
    finished: Path,
    experiment: Path,
    environment: dict[str, str],
    glm_jax: Cli,
    tmp_path: Path,
) -> None:
    workdir = tmp_path / "run"
    saving = f"--config.train.save_every={save_every}"
    arguments = ["train", "--config", str(experiment), "--workdir", str(workdir), saving]
    process = subprocess.Popen(
        [sys.executable, "-m", "glm_jax", *arguments], env=environment, stderr=subprocess.PIPE, text=True
    )
    deadline = time.monotonic() + HANG
    while time.monotonic() < deadline and process.poll() is None:
        metrics = workdir / "metrics.jsonl"
        if metrics.exists() and '"step": 2,' in metrics.read_text(encoding="utf-8"):
            process.send_signal(number)
            break
        time.sleep(0.01)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 3, said
    assert "the same command resumes from there" in said.splitlines()[-1]
    assert 2 <= max(events(workdir, "train")) < 12
    assert glm_jax(*arguments).returncode == 0
    assert events(workdir, "train") == events(finished, "train")
    assert events(workdir, "evaluation") == events(finished, "evaluation")


def test_a_dead_run_fails_in_a_line_and_keeps_its_last_healthy_checkpoint(
    experiment: Path, glm_jax: Cli, tmp_path: Path
) -> None:
    rate = ["--config.optimizer.peak_lr=1e15", "--config.optimizer.min_lr=1e15", "--config.optimizer.warmup_samples=8"]
    often = ["--config.train.save_every=1", "--config.train.dead_after=3", "--config.train.keep=1"]
    done = glm_jax("train", "--config", experiment, "--workdir", tmp_path / "run", *rate, *often)
    assert done.returncode == 4, done.stderr
    assert "Traceback" not in done.stderr and "NaN or Inf" not in done.stderr
    last = done.stderr.splitlines()[-1]
    assert last.startswith("failed: the loss or the update has not been finite for 3 steps, since step ")
    (saved,) = (int(path.name) for path in (tmp_path / "run/checkpoints").iterdir())
    assert last.endswith(f"the newest checkpoint is that of step {saved}")
    losses = {step: event["loss"] for step, event in events(tmp_path / "run", "train").items()}
    assert math.isfinite(losses[saved]) and losses[max(losses)] is None


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
            assert numbers(event) == pytest.approx(numbers(together[step]), rel=1e-4)


def test_short_rows_train_and_a_damaged_checkpoint_is_skipped(glm_jax: Cli, experiment: Path, tmp_path: Path) -> None:
    arguments = ["train", "--config", experiment, "--workdir", tmp_path / "run", "--config.data.seq_length=32"]
    generate = ["generate", "--workdir", tmp_path / "run", "--prompt", "[MASK]", "--max_tokens", "5"]
    arguments += ["--config.train.eval_every=0", "--config.train.save_every=2"]
    done = glm_jax(*arguments, "--config.train.steps=4", "--config.optimizer.decay_samples=96")
    assert done.returncode == 0, done.stderr
    checkpoints = tmp_path / "run" / "checkpoints"
    shutil.rmtree(checkpoints / "4" / "params")
    filled = glm_jax(*generate)
    assert filled.returncode == 0 and "checkpoint 4 is skipped: " in filled.stderr
    again = glm_jax(*arguments, "--config.train.steps=6", "--config.optimizer.decay_samples=96")
    assert again.returncode == 0, again.stderr
    assert "checkpoint 4 is skipped: " in again.stderr and "resuming from step 2" in again.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4", "4.damaged", "6"]
    assert list(events(tmp_path / "run", "train")) == [1, 2, 3, 4, 5, 6]
    for step in ("2", "4", "6"):
        shutil.rmtree(checkpoints / step / "params")
    for damaged in (glm_jax(*arguments), glm_jax(*generate)):
        last = damaged.stderr.splitlines()[-1]
        assert damaged.returncode == 2 and last.startswith("error: ") and "no checkpoint in" in last, damaged.stderr
    assert sorted(path.name for path in checkpoints.iterdir()) == ["2", "4", "4.damaged", "6"]


@pytest.mark.oldest
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
