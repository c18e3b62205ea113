"""`glm-jax sweep` as a user runs it: listed, run, interrupted, killed and resumed, refused."""

import fcntl
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import HANG

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]

SWEEP = """

def get_sweep():
    return {
        "model.norm": ("post", "deepnorm"),
        "lr": {"calm": {"optimizer.peak_lr": 1e-3}, "wild": {"optimizer.peak_lr": 1e16}},
        "seed": (1, 2),
    }
"""
SMALL = ["--config.model.num_layers=2", "--config.model.hidden_size=16", "--config.model.ffn_size=24",
         "--config.model.hidden_dropout=0.0", "--config.train.steps=30"]  # fmt: skip


@pytest.fixture(scope="module")
def ablation(experiment: Path) -> Path:
    path = experiment.with_name("ablation.py")
    path.write_text(experiment.read_text(encoding="utf-8") + SWEEP, encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def finished(ablation: Path, glm_jax: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run the sweep without interruption, and return its workdir."""
    workdir = tmp_path_factory.mktemp("finished") / "sweep"
    done = glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL, "--parallel=2")
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == f"done: {workdir / 'results.md'}"
    return workdir


def start(environment: dict[str, str], ablation: Path, workdir: Path, *flags: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "glm_jax", "sweep", "--config", str(ablation), "--workdir", str(workdir), *SMALL]
    return subprocess.Popen([*command, "--parallel=1", *flags], env=environment, stderr=subprocess.PIPE, text=True)


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + HANG
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


def tables(workdir: Path) -> list[bytes]:
    return [(workdir / name).read_bytes() for name in ("results.json", "results.md")]


def one_line(done: subprocess.CompletedProcess[str]) -> str:
    """Check that a command was refused in one line, and return the line."""
    assert done.returncode == 2 and "Traceback" not in done.stderr, done.stderr
    (error,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return error


def test_a_sweep_leaves_results_curves_and_a_table(finished: Path) -> None:
    rows = json.loads((finished / "results.json").read_text())
    assert [row["name"] for row in rows][:3] == [
        "norm=post,lr=calm,seed=1", "norm=post,lr=calm,seed=2", "norm=post,lr=wild,seed=1"]  # fmt: skip
    assert len(rows) == 8
    for row in rows:
        wild = row["labels"]["lr"] == "wild"
        assert (row["reason"] == "not finite") == wild
        assert (row["status"] == "diverged") == (row["reason"] is not None) == (row["step"] is not None)
    member = json.loads((finished / "members" / "norm=post,lr=calm,seed=1.json").read_text())
    assert len(member["curves"]["loss"]) == 30 and member["run"]["members"] == 4
    assert set(member["heldout"]) >= {"loss", "loss/en", "loss/zh"}
    text = (finished / "results.md").read_text()
    assert "8 of 8 members are there" in text and "| post | wild | 0 of 2 |  |  | not finite (2) |" in text
    description = json.loads((finished / "sweep.json").read_text())
    assert description["rule"]["rise"] == 0.5 and description["base"]["train.steps"] == 30
    assert description["command"].startswith("glm-jax sweep --config") and "jax" in description["versions"]


def test_a_finished_sweep_does_nothing(ablation: Path, finished: Path, glm_jax: Cli) -> None:
    before = {path: path.stat().st_mtime_ns for path in (finished / "members").iterdir()}
    done = glm_jax("sweep", "--config", ablation, "--workdir", finished, *SMALL)
    assert done.returncode == 0 and "2 of 2 groups are done" in done.stderr
    assert {path: path.stat().st_mtime_ns for path in (finished / "members").iterdir()} == before


def test_a_killed_sweep_gives_the_same_table(
    ablation: Path, finished: Path, glm_jax: Cli, environment: dict[str, str], tmp_path: Path
) -> None:
    workdir = tmp_path / "sweep"
    process = start(environment, ablation, workdir)
    wait_for(lambda: len(list((workdir / "members").glob("*.json"))) == 4 and len(list(workdir.glob("logs/*"))) == 2)
    process.kill()
    process.communicate()
    survivors = {path: path.stat().st_mtime_ns for path in (workdir / "members").glob("*.json")}
    assert len(survivors) == 4
    done = glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL)
    assert done.returncode == 0 and "1 of 2 groups are done" in done.stderr, done.stderr
    assert {path: path.stat().st_mtime_ns for path in survivors} == survivors
    assert tables(workdir) == tables(finished)
    # A group that lacks a member is trained again as a whole, and so has the same numbers.
    (workdir / "members" / "norm=deepnorm,lr=calm,seed=2.json").unlink()
    (workdir / "members" / "norm=deepnorm,lr=calm,seed=1.json").write_text('{"name": "cut off')
    done = glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL)
    assert done.returncode == 0 and "1 of 2 groups are done" in done.stderr, done.stderr
    assert tables(workdir) == tables(finished)


def test_an_interrupted_sweep_says_so_in_a_line(ablation: Path, environment: dict[str, str], tmp_path: Path) -> None:
    # more steps than any group takes before the signal comes, however busy the machine
    process = start(environment, ablation, tmp_path / "sweep", "--config.train.steps=100000")
    wait_for(lambda: any((tmp_path / "sweep").glob("logs/*")))
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=HANG)
    assert process.returncode == 3 and "Traceback" not in said
    assert said.splitlines()[-1].startswith("stopped: what is done is kept in")
    assert "0 of 8 members are there" in (tmp_path / "sweep" / "results.md").read_text()


def test_a_dry_run_lists_and_writes_nothing(ablation: Path, glm_jax: Cli, tmp_path: Path) -> None:
    done = glm_jax("sweep", "--config", ablation, "--workdir", tmp_path / "sweep", *SMALL, "--dry-run")
    assert done.returncode == 0 and not os.listdir(tmp_path)
    lines = done.stdout.splitlines()
    assert lines[0] == f"{ablation}: 8 members in 2 groups"
    assert lines[1] == "01 norm=post: 4 members, 30 steps" and lines[2] == "  norm=post,lr=calm,seed=1"
    assert len(lines) == 1 + 2 + 8
    assert glm_jax("sweep", "--config", ablation, "--dry-run=true").returncode == 0


def test_one_sweep_at_a_time_and_a_group_that_fails(ablation: Path, glm_jax: Cli, tmp_path: Path) -> None:
    workdir = tmp_path / "sweep"
    workdir.mkdir()
    folder = os.open(workdir, os.O_RDONLY)
    fcntl.flock(folder, fcntl.LOCK_EX)
    line = one_line(glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL))
    assert "another run is using" in line and not os.listdir(workdir)
    os.close(folder)
    (workdir / "members").touch()  # where results should go
    done = glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL)
    assert "cannot be written to" in one_line(done)
    (workdir / "members").unlink()
    (workdir / "logs" / "01-norm=post.log").mkdir(parents=True)
    done = glm_jax("sweep", "--config", ablation, "--workdir", workdir, *SMALL)
    assert "1 of 2 groups failed" in one_line(done) and "01 norm=post: " in done.stderr
    assert len(list((workdir / "members").iterdir())) == 4


def test_what_is_refused(ablation: Path, experiment: Path, finished: Path, glm_jax: Cli, tmp_path: Path) -> None:
    workdir = ["--workdir", tmp_path / "sweep"]
    assert "has no get_sweep()" in one_line(glm_jax("sweep", "--config", experiment, *workdir))
    assert "model.hidden_size 30" in one_line(
        glm_jax("sweep", "--config", ablation, *workdir, "--config.model.hidden_size=30", "--config.model.num_heads=4")
    )
    assert "--workdir is missing" in one_line(glm_jax("sweep", "--config", ablation))
    bad = ablation.with_name("bad.py")
    for axes, said in (("{}", "not empty"), ('{"model.nrom": ("pre",)}', "did you mean model.norm?"),
                       ('{"model.norm": ("batch",)}', "norm=batch: model.norm is 'batch'"),
                       ("1 / 0", "division by zero")):  # fmt: skip
        bad.write_text(experiment.read_text(encoding="utf-8") + f"\n\ndef get_sweep():\n    return {axes}\n")
        assert said in one_line(glm_jax("sweep", "--config", bad, *workdir))
    assert not (tmp_path / "sweep").exists()
    before = tables(finished)
    line = one_line(glm_jax("sweep", "--config", ablation, "--workdir", finished, *SMALL, "--config.train.steps=31"))
    assert "holds a sweep with other base (train.steps was 30, it is 31)" in line
    again = ablation.with_name("again.py")
    again.write_text(ablation.read_text(encoding="utf-8").replace('"seed": (1, 2),', "").replace(
        "    return {", '    return {"seed": (1, 2),'), encoding="utf-8")  # fmt: skip
    line = one_line(glm_jax("sweep", "--config", again, "--workdir", finished, *SMALL))
    assert "holds a sweep with other members" in line  # members in another order have other names
    assert tables(finished) == before
    description = json.loads((finished / "sweep.json").read_text())
    (tmp_path / "moved").mkdir()
    description["data"][0]["tokenizer"] = "another"
    (tmp_path / "moved" / "sweep.json").write_text(json.dumps(description))
    line = one_line(glm_jax("sweep", "--config", ablation, "--workdir", tmp_path / "moved", *SMALL))
    assert "holds a sweep with other data (its texts or its tokenizer have changed)" in line
