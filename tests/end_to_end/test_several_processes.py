"""A run of two processes on one machine: it has the numbers of one process, stops as a whole, and may lose one."""

import json
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.patience import HANG

pytestmark = pytest.mark.slow

Process = subprocess.Popen[str]
Start = Callable[..., list[Process]]
Ended = tuple[int, list[str]]  # exit code, lines of standard error

TOGETHER = ["--config.mesh.data=2", "--config.mesh.collective_timeout=20"]
ALONE = ["--config.mesh.data=1"]


def free_port() -> int:
    """Return a port that nothing listens on."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def by_flags(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the flags and variables by which a user tells a process of the others."""
    return [f"--coordinator=127.0.0.1:{port}", "--processes=2", f"--process={index}"], {}


def by_slurm(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the flags and variables of `srun`; jax takes a port from the number of the job."""
    here = {"SLURM_STEP_NODELIST": "localhost", "SLURM_NTASKS": "2", "SLURM_PROCID": str(index)}
    return [], {**here, "SLURM_JOB_ID": "1", "SLURM_LOCALID": str(index), "JAX_COORDINATOR_PORT": str(port)}


def by_open_mpi(index: int, port: int) -> tuple[list[str], dict[str, str]]:
    """Return the flags and variables of `mpirun`."""
    here = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://127.0.0.1:1", "OMPI_COMM_WORLD_SIZE": "2"}
    rank = {"OMPI_COMM_WORLD_RANK": str(index), "OMPI_COMM_WORLD_LOCAL_RANK": str(index)}
    return [], {**here, **rank, "JAX_COORDINATOR_PORT": str(port)}


@pytest.fixture
def start(experiment: Path, environment: dict[str, str]) -> Iterator[Start]:
    """Return a function that starts `glm-jax train` in two processes of one device each."""
    started: list[Process] = []

    def two(workdir: Path, *arguments: str, told: Callable[..., Any] = by_flags, own: Any = ((), ())) -> list[Process]:
        port, processes = free_port(), []
        for index in range(2):
            flags, variables = told(index, port)
            command = [sys.executable, "-m", "glm_jax", "train", "--config", str(experiment), "--workdir", str(workdir)]
            processes.append(
                subprocess.Popen(
                    [*command, *arguments, *own[index], *flags],
                    env={**environment, "JAX_NUM_CPU_DEVICES": "1", **variables},
                    stdout=subprocess.PIPE,
                    stderr=subprocess.PIPE,
                    text=True,
                )
            )
        started.extend(processes)
        return processes

    yield two
    for process in started:
        process.kill()
        process.communicate()


def ends(process: Process) -> Ended:
    """Wait for the end, and return how it ended; lines leave out the one about the devices."""
    said = process.communicate(timeout=HANG)[1]
    return process.returncode, [line for line in said.split("\n") if line.strip() and not line.startswith("devices: ")]


def events(workdir: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Return the events of one kind, by step."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    found = [event for event in map(json.loads, lines) if event["event"] == kind]
    assert len({event["step"] for event in found}) == len(found)  # one process writes, and each step only once
    return {event["step"]: event for event in found}


def wait_for_step(workdir: Path, step: int, processes: list[Process]) -> None:
    """Wait until the metrics have a step."""
    metrics, deadline = workdir / "metrics.jsonl", time.monotonic() + HANG
    while time.monotonic() < deadline and all(process.poll() is None for process in processes):
        if metrics.exists() and f'"event": "train", "step": {step},' in metrics.read_text(encoding="utf-8"):
            return
        time.sleep(0.02)
    raise AssertionError(f"step {step} did not come: {[ends(process) for process in processes if process.poll()]}")


def saved(workdir: Path) -> list[int]:
    """Return the steps of the checkpoints."""
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir() if path.name.isdecimal())


@pytest.mark.parametrize(("axis", "steps"), [("data", 20), ("pipeline", 4)])
def test_two_processes_equal_one_on_the_same_mesh(
    axis: str, steps: int, start: Start, glm_jax: Callable[..., Any], experiment: Path, tmp_path: Path
) -> None:
    mesh = [f"--config.mesh.{axis}=2", "--config.optimizer.decay_samples=192"]
    until = [f"--config.train.steps={steps}", f"--config.train.eval_every={steps}", "--config.train.save_every=50"]
    together, alone = tmp_path / "together", tmp_path / "alone"
    (code, said), (other, silent) = map(ends, start(together, *mesh, *until))
    assert (code, other) == (0, 0), (said, silent)
    assert silent == [] and any("held-out at step" in line for line in said)
    train = ["train", "--config", experiment, "--workdir"]
    done = glm_jax(*train, alone, *mesh, *until, devices=2)
    assert done.returncode == 0, done.stderr
    for kind in ("train", "evaluation"):
        ours, theirs = events(together, kind), events(alone, kind)
        assert list(ours) == list(theirs) and max(ours) == steps
        for step, event in ours.items():
            for name in (name for name in event if name.startswith("loss")):
                assert event[name] == pytest.approx(theirs[step][name], rel=1e-6)
    trained = events(together, "train").values()
    speeds = [event["tokens_per_second"] / event["mfu"] / event["tokens"] for event in trained]
    assert speeds == pytest.approx(speeds[:1] * steps, rel=1e-9)  # counts the tokens of both
    assert {path.name for path in together.iterdir()} == {path.name for path in alone.iterdir()}
    if axis == "pipeline":
        weights = [f"--config.train.init_from={alone}", "--config.train.lora.rank=2", "--config.train.eval_every=2"]
        for until in (1, 2):  # three layers, padded to two stages; the second time adapters resume, and read their base
            steps_taken = f"--config.train.steps={until}"
            results = list(map(ends, start(tmp_path / "begun", *mesh, *weights, steps_taken)))
            assert [code for code, _ in results] == [0, 0] and results[1][1] == [], results
        loss = events(tmp_path / "begun", "evaluation")[0]["loss"]
        assert loss == pytest.approx(events(alone, "evaluation")[steps]["loss"], rel=1e-5)
        return

    more = ["--config.optimizer.decay_samples=192", f"--config.train.steps={steps + 2}", "--config.train.eval_every=0"]
    done = glm_jax(*train, together, *more)  # from two processes on a mesh of two to one on one device
    assert done.returncode == 0, done.stderr
    results = list(map(ends, start(alone, *mesh, *more)))  # and the other way
    assert [code for code, _ in results] == [0, 0], results
    for workdir, said in ((together, done.stderr), (alone, "\n".join(results[0][1]))):
        assert f"resuming from step {steps}" in said and steps + 2 in saved(workdir)
    ours, theirs = events(together, "train"), events(alone, "train")
    assert [ours[step]["loss"] for step in ours] == pytest.approx([theirs[step]["loss"] for step in theirs], rel=1e-4)


def test_a_request_to_one_stops_both_and_a_lost_one_ends_the_other(
    start: Start, glm_jax: Callable[..., Any], experiment: Path, tmp_path: Path
) -> None:
    workdir = tmp_path / "run"
    arguments = [*TOGETHER, "--config.train.steps=10000", "--config.train.eval_every=0", "--config.train.save_every=10"]
    processes = start(workdir, *arguments, told=by_slurm)
    wait_for_step(workdir, 2, processes)
    processes[1].send_signal(signal.SIGTERM)
    (code, said), (other, silent) = map(ends, processes)
    assert (code, other) == (3, 3), (said, silent)
    stopped = max(events(workdir, "train"))
    assert max(saved(workdir)) == stopped
    assert said[-1].startswith(f"stopped: step {stopped} is saved") and silent == []

    for victim in (1, 0):
        step = max(saved(workdir))
        processes = start(workdir, *arguments, told=by_open_mpi)
        wait_for_step(workdir, step + 12, processes)  # a checkpoint is behind it, or being written
        processes[victim].send_signal(signal.SIGKILL)
        code, lines = ends(processes[1 - victim])
        assert code == 1 and lines[-1].startswith("error: ") and "another process is gone" in lines[-1], lines
        assert "Traceback" not in "".join(lines)
        assert max(saved(workdir)) >= step

    step = max(saved(workdir))
    more = ["--config.train.steps", str(step + 1), "--config.train.eval_every=0", *ALONE]
    done = glm_jax("train", "--config", experiment, "--workdir", workdir, *more)
    assert done.returncode == 0 and f"resuming from step {step}" in done.stderr, done.stderr
    assert list(events(workdir, "train")) == list(range(1, step + 2))


def test_a_mistake_is_reported_and_no_process_waits_forever(start: Start, tmp_path: Path) -> None:
    (code, said), (other, told) = map(ends, start(tmp_path / "both", "--config.mesh.data=3"))
    assert (code, other) == (2, 2) and said == told and said[-1].startswith("error: mesh.data=3"), (said, told)
    assert not (tmp_path / "both").exists()

    file = tmp_path / "file"
    file.write_text("no folder")
    own = (["--workdir", str(file / "run")], [])
    (code, said), (other, told) = map(ends, start(tmp_path / "one", *TOGETHER, own=own))
    assert (code, other) == (2, 1), (said, told)
    assert said[-1].startswith(f"error: --workdir {file / 'run'}")
    assert told == [f"error: another process has stopped (process 0: {said[-1].removeprefix('error: ')}): "
                    "fix it, then start all again"]  # fmt: skip


def test_processes_that_do_not_find_one_another_say_so(glm_jax: Callable[..., Any], experiment: Path) -> None:
    done = glm_jax("train", "--config", experiment, "--workdir", "unused", "--process=1")
    assert done.returncode == 2
    assert done.stderr == "error: --coordinator, --processes and --process go together: give all three, or none\n"
