"""Joining a run of several processes, and exiting when another has stopped or is gone."""

import os
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import jax
import pytest
from orbax.checkpoint import multihost

from glm_jax.errors import UserError
from glm_jax.parallel import processes, schedulers
from tests.patience import HANG

SLURM = {"SLURM_STEP_NODELIST": "node[001-004]", "SLURM_NTASKS": "4", "SLURM_PROCID": "1"}
OPEN_MPI = {"OMPI_MCA_orte_hnp_uri": "4096.0;tcp://10.0.0.1:34911", "OMPI_COMM_WORLD_SIZE": "2"}


@pytest.mark.parametrize(
    ("environment", "several"),
    [
        ({}, False),
        (SLURM, True),
        ({**SLURM, "SLURM_NTASKS": "1"}, False),
        ({"SLURM_NTASKS": "4"}, False),  # inside an allocation, but not started by srun
        (OPEN_MPI, True),
        ({**OPEN_MPI, "OMPI_COMM_WORLD_SIZE": "1"}, False),
        ({"TPU_WORKER_HOSTNAMES": "10.0.0.1,10.0.0.2", "TPU_WORKER_ID": "1"}, True),  # Cloud TPU: only the decision
        ({"TPU_WORKER_HOSTNAMES": "localhost"}, False),
    ],
)
def test_the_environment_shows_whether_there_are_others(environment: dict[str, str], several: bool) -> None:
    assert schedulers.scheduled(environment) is several


@pytest.mark.parametrize("count, index", [(1, 0), (2, 0), (2, 1)])
def test_a_process_knows_whether_it_is_alone_and_the_first(
    monkeypatch: pytest.MonkeyPatch, count: int, index: int
) -> None:
    monkeypatch.setattr(jax, "process_count", lambda: count)
    monkeypatch.setattr(jax, "process_index", lambda: index)
    assert (processes.alone(), processes.is_first()) == (count == 1, index == 0)


def test_telling_others_of_a_mistake_works_even_if_they_are_gone(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {}

    def wait(**meeting: Any) -> None:
        raise jax.errors.JaxRuntimeError("DEADLINE_EXCEEDED")

    client = SimpleNamespace(key_value_set=told.__setitem__)
    monkeypatch.setattr(multihost, "get_jax_distributed_client", lambda: client)
    monkeypatch.setattr(multihost, "get_barrier_sync_fn", lambda: wait)
    processes._tell("no such file")
    assert list(told.values()) == ["process 0: no such file"]


@pytest.mark.parametrize(
    ("coordinator", "count", "index", "told"),
    [
        ("localhost:1234", 2, None, "--coordinator, --processes and --process go together"),
        (None, None, 0, "--coordinator, --processes and --process go together"),
        ("localhost:1234", 2, 2, "--process=2 of --processes=2: they count from 0 to 1"),
        ("localhost", 2, 1, "--coordinator=localhost is not HOST:PORT"),
    ],
)
def test_flags_that_make_no_sense_are_refused(coordinator: str, count: int, index: int, told: str) -> None:
    with pytest.raises(UserError, match=re.escape(told)):
        processes.start(coordinator, count, index, 20)


@pytest.mark.parametrize("environment", [{}, SLURM])
def test_only_those_who_have_others_join_them(environment: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    joined = []
    for name in (*SLURM, *OPEN_MPI, "TPU_WORKER_HOSTNAMES"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {**environment, "XLA_FLAGS": "--of_ours"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(processes.jax.config, "update", lambda *_: None)
    monkeypatch.setattr(processes.jax.distributed, "initialize", lambda *given, **more: joined.append((given, more)))
    monkeypatch.setattr(processes, "_exit_on_abort", lambda: None)
    processes.start(None, None, None, 25)
    if environment:
        assert joined == [((None, None, None), {"heartbeat_timeout_seconds": 25})]
        assert os.environ["XLA_FLAGS"] == "--of_ours --xla_cpu_collective_timeout_seconds=25"
    else:
        assert joined == [] and os.environ["XLA_FLAGS"] == "--of_ours"


def test_a_process_leaves_as_it_has_decided_even_if_jax_aborts_it_first() -> None:
    """The processes that it tells of a mistake may exit first, and then jax aborts it."""
    for decide, line, code in (
        ("processes._decide('error: no such file', 2)", "error: no such file", 2),
        ("pass", "error: aborted, most likely because another process is gone", 1),
    ):
        script = f"import os; from glm_jax.parallel import processes; processes._exit_on_abort(); {decide}; os.abort()"
        ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
        assert ended.returncode == code and ended.stderr.startswith(line), ended.stderr


# Two processes that meet, print that they did, and then act as their arguments say.
SCRIPT = """
import os, sys, time
from glm_jax.errors import UserError
from glm_jax.parallel import processes, schedulers

def run():
    processes.wait_for_all()
    print("met", flush=True)
    if act == "sleep":
        time.sleep(300)
    if act == "fail":
        raise UserError("its texts cannot be read: bring them")
    if act == "break":
        raise KeyError("a mistake of the program")
    processes.wait_for_all()
    return 0

port, index, act, heartbeat = sys.argv[1:]
processes.HEARTBEAT = int(heartbeat)
processes.start(f"127.0.0.1:{port}", 2, int(index), int(heartbeat))
sys.exit(processes.together(run))
"""


Meet = Callable[..., list["subprocess.Popen[str]"]]


@pytest.fixture
def meet() -> Iterator[Meet]:
    """Return a function that starts a process for each act and waits until all have met; then they perform their acts.

    A process without a sign of life for `heartbeat` seconds counts as gone, even if the machine is only busy: use few
    seconds where one does go, and many elsewhere.
    """
    started: list[subprocess.Popen[str]] = []

    def start(*acts: str, heartbeat: int = 100) -> list["subprocess.Popen[str]"]:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
        for index, act in enumerate(acts):
            command = [sys.executable, "-c", SCRIPT, port, str(index), act, str(heartbeat)]
            pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
            started.append(subprocess.Popen(command, env=environment, **pipes))
        for process in started:
            assert process.stdout is not None and "met\n" in process.stdout  # gloo prints its own lines first
        return started

    yield start
    for process in started:
        process.kill()
        process.communicate()


def last_line(process: "subprocess.Popen[str]") -> str:
    """Wait until a process ends and return its last line. Threads of jax may log something after it."""
    errors = process.communicate(timeout=HANG)[1].splitlines()
    own = [line for line in errors if line.startswith(("error: ", "KeyError: "))]
    assert own, errors
    return own[-1]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_one_that_waits_for_a_dead_process_ends(meet: Meet, victim: int) -> None:
    started = meet(*("sleep" if index == victim else "wait" for index in range(2)), heartbeat=3)
    started[victim].send_signal(signal.SIGKILL)
    survivor = started[1 - victim]
    line = last_line(survivor)
    assert survivor.returncode == 1 and line.startswith("error: ") and "another process is gone" in line


@pytest.mark.slow
def test_one_that_is_busy_when_another_dies_ends(meet: Meet) -> None:
    started = meet("sleep", "sleep", heartbeat=3)
    started[0].send_signal(signal.SIGKILL)
    line = last_line(started[1])
    assert started[1].returncode == 1
    assert line == "error: aborted, most likely because another process is gone: start all again with the same command"


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
def test_the_others_are_told_of_a_mistake_that_one_has_found(meet: Meet, victim: int) -> None:
    started = meet(*("fail" if index == victim else "wait" for index in range(2)))
    own, told = last_line(started[victim]), last_line(started[1 - victim])
    assert [started[victim].returncode, started[1 - victim].returncode] == [2, 1]
    reason = "its texts cannot be read: bring them"
    assert own == f"error: {reason}"
    assert told == f"error: another process has stopped (process {victim}: {reason}): fix it, then start all again"


@pytest.mark.slow
def test_a_mistake_that_all_have_found_is_reported_by_each(meet: Meet) -> None:
    started = meet("fail", "fail")
    assert [last_line(process) for process in started] == ["error: its texts cannot be read: bring them"] * 2
    assert [process.returncode for process in started] == [2, 2]


@pytest.mark.slow
def test_a_mistake_of_the_program_is_shown_and_ends_all(meet: Meet) -> None:
    started = meet("break", "wait")
    assert last_line(started[0]) == "KeyError: 'a mistake of the program'"
    assert "another process has stopped (process 0: KeyError, see there)" in last_line(started[1])
    assert [process.returncode for process in started] == [1, 1]
