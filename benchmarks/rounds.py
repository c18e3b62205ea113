"""Time processes in turns: what a benchmark compares runs on the same machine in the same minutes.

Each side is a process, with its own allocator, threads, packages and checkout. In a round each side has one turn while
the others wait. Rounds in which anything else kept the machine busy are measured again.
"""

from __future__ import annotations

import json
import os
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

TREE = Path(__file__).resolve().parent.parent  # the checkout that this file is of
CORES = 2  # that a side may use
QUIET = 0.05  # of the machine's cores: what everything else may use in a round that counts
TICK = os.sysconf("SC_CLK_TCK")


class Side(NamedTuple):
    """One of the things to compare."""

    name: str
    command: Sequence[str]  # a process that calls `serve`
    environment: Mapping[str, str]  # besides this process's own


def script(
    name: str, file: str, *words: str, tree: Path = TREE, python: str = sys.executable,
    environment: Mapping[str, str] = MappingProxyType({}),
) -> Side:  # fmt: skip
    """Return a side that is a script of this folder, which finds the glm_jax of a checkout."""
    return Side(name, [python, file, *words], {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree), **environment})


class Turn(NamedTuple):
    """One turn of one side, in seconds."""

    wall: float
    cpu: float
    parts: Mapping[str, float]  # what the side measured itself, by name
    others: float  # the share of the machine that was busy with something else


class Measured(NamedTuple):
    """What came of one side."""

    turns: Sequence[Turn]  # those of the rounds that count
    about: Mapping[str, Any]  # what the side said of its first turn

    def seconds(self, part: str = "") -> list[float]:
        """Return the wall-clock seconds of each turn, or of a part."""
        return [turn.parts[part] if part else turn.wall for turn in self.turns]

    def cpu_seconds(self, part: str = "") -> list[float]:
        """Return the CPU seconds of each turn, or of a part, which then is `<part>_cpu`."""
        return [turn.parts[f"{part}_cpu"] if part else turn.cpu for turn in self.turns]


def clock(part: str, work: Callable[[], object]) -> dict[str, float]:
    """Do some work; return its wall-clock and CPU seconds as the parts that `Measured` reads."""
    wall, cpu = time.perf_counter(), cpu_time()
    work()
    return {part: time.perf_counter() - wall, f"{part}_cpu": cpu_time() - cpu}


def cpu_time() -> float:
    """Return the CPU seconds of this process and of the processes that it has started and waited for."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


def serve(
    turn: Callable[[], Mapping[str, float]], about: Callable[[], Mapping[str, object]] = dict, *, warm: bool = True
) -> None:
    """Be a side: take a turn for every line of stdin, and answer each in JSON; say `about` before.

    What a turn prints goes to stderr.

    Args:
        turn: returns what it measured itself, by name.
        about: returns what the side says of itself.
        warm: take a first turn before `about`, and then each turn twice, of which the second counts: while a process
            waits, caches forget it, and a virtual machine may take its memory back. False if turns start processes.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    if warm:
        turn()
    print(json.dumps(about()), file=answers, flush=True)
    for _ in sys.stdin:
        whole = cpu_time()
        if warm:
            turn()
        wall, cpu = time.perf_counter(), cpu_time()
        parts = turn()
        answer = {"wall": time.perf_counter() - wall, "cpu": cpu_time() - cpu, "parts": parts}
        print(json.dumps({**answer, "whole_cpu": cpu_time() - whole}), file=answers, flush=True)


class _Process:
    """A running side."""

    def __init__(self, side: Side) -> None:
        self.name = side.name
        limits = {name: str(CORES) for name in ("NPROC", "OMP_NUM_THREADS", "MKL_NUM_THREADS")}
        environment = {**os.environ, **limits, "OMP_WAIT_POLICY": "passive", **side.environment}  # a wait is not work
        self.process = subprocess.Popen(
            side.command, text=True, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE
        )
        self.about: Mapping[str, Any] = self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        lines = iter(self.process.stdout.readline, "")
        line = next((line for line in lines if line.startswith("{")), None)  # imports may print, too
        if line is None:
            raise SystemExit(f"the side {self.name!r} ended early, with code {self.process.wait()}")
        return json.loads(line)

    def turn(self) -> Turn:
        assert self.process.stdin is not None
        start, busy = time.perf_counter(), _busy()
        print(file=self.process.stdin, flush=True)
        answer = self._answer()
        machine = (time.perf_counter() - start) * (os.cpu_count() or 1)
        others = max(0.0, _busy() - busy - answer["whole_cpu"]) / machine
        return Turn(answer["wall"], answer["cpu"], answer["parts"], others)

    def end(self) -> None:
        self.process.communicate()


def _busy() -> float:
    """Return the seconds that the machine's cores have worked since it started."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, interrupts, soft, stolen = map(int, file.readline().split()[1:9])
    return (user + nice + system + interrupts + soft + stolen) / TICK


def measure(sides: Sequence[Side], rounds: int) -> dict[str, Measured]:
    """Give every side one turn a round until `rounds` of them were quiet, and return those turns.

    After three times as many rounds the quietest are returned, with a line that says so.
    """
    held = [_Process(side) for side in sides]
    taken: list[list[Turn]] = []
    try:
        while len(taken) < 3 * rounds and sum(map(_is_quiet, taken)) < rounds:
            first = len(taken) % len(held)  # no side always follows the same one
            order = [*range(first, len(held)), *range(first)]
            turns = dict(zip(order, (held[index].turn() for index in order), strict=True))
            taken.append([turns[index] for index in range(len(held))])
            note = "" if _is_quiet(taken[-1]) else ", not quiet"
            print(f"\rround {len(taken)}{note}    ", end="", file=sys.stderr, flush=True)
    finally:
        for process in held:
            process.end()
    print(file=sys.stderr)
    kept = sorted(taken, key=_others)[:rounds]
    quiet = sum(map(_is_quiet, taken))
    if quiet < rounds:
        print(f"only {quiet} of {len(taken)} rounds were quiet: the {len(kept)} quietest count, of which the worst had "
              f"{_others(kept[-1]):.0%} of the machine busy with something else")  # fmt: skip
    return {
        side.name: Measured([turns[index] for turns in kept], held[index].about) for index, side in enumerate(sides)
    }


def _others(turns: Sequence[Turn]) -> float:
    return max(turn.others for turn in turns)


def _is_quiet(turns: Sequence[Turn]) -> bool:
    return _others(turns) <= QUIET


def interval(values: Sequence[float], digits: int = 2) -> str:
    """Return `median (smallest to largest)`."""
    low, high = min(values), max(values)
    return f"{statistics.median(values):.{digits}f} ({low:.{digits}f} to {high:.{digits}f})"


def ratios(above: Sequence[float], below: Sequence[float]) -> str:
    """Return the interval of above / below, round by round."""
    return interval([over / under for over, under in zip(above, below, strict=True)])


def compare(measured: Mapping[str, Measured], name: str, base: str, part: str = "") -> str:
    """Return a line with the ratios of one side, or of a part of its turns, to another."""
    above, below = measured[name], measured[base]
    return (f"{name} / {base}{part and f', {part}'}: {ratios(above.seconds(part), below.seconds(part))} of the "
            f"seconds, {ratios(above.cpu_seconds(part), below.cpu_seconds(part))} of the CPU seconds")  # fmt: skip
