"""Run templates on records in a process with limits (sandbox.py), and tell prompts from what has to be left out."""

from __future__ import annotations

import atexit
import contextlib
import importlib.util
import json
import os
import pickle
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

from glm_jax import signals
from glm_jax.errors import UserError

Place = TypeVar("Place")
Prompt = tuple[str, str]  # a prompt and its answer

SECONDS = 2.0  # of processor time for one record; usual templates take less than a millisecond
MEMORY = 512_000_000  # bytes of address space for the process, of which Python and Jinja take about 60 MB
GROUP_JOBS, GROUP_BYTES = 256, 1_000_000  # jobs are sent in groups up to one of these, to wait less often
FAILS, OVER_BUDGET = "template fails", "over budget"  # reasons
OVER_MEMORY = 64  # exit status of the process when memory ran out
CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS)  # the stack or the memory ran out within Python itself


@dataclass(frozen=True)
class Refused:
    """Why a record gives no prompt.

    Attributes:
        reason: one of a few names, for counting.
        message: what is wrong and how to fix it, worded to follow a place.
    """

    reason: str
    message: str


@dataclass(frozen=True)
class Render:
    """A template to run on a record; without a record, only to compile. `seed` is that of its random choices."""

    name: str
    jinja: str
    answer_choices: str | None
    record: Mapping[str, object] | None
    seed: int = 0


Answer = Prompt | Refused | None  # None: the template has nothing to ask about the record


def answers(jobs: Iterable[tuple[Place, Render | Answer]]) -> Iterator[tuple[Place, Answer]]:
    """Yield each job's place and its answer, in order. An answer given as a job comes back as it is.

    Raises:
        UserError: jinja2 is not installed, or the process that renders was killed from outside.
    """
    group: list[tuple[Place, Render | Answer]] = []
    sent: list[bytes] = []
    size = 0
    for place, job in jobs:
        if not isinstance(job, Render) and not group:  # nothing to wait for
            yield place, job
            continue
        if isinstance(job, Render):
            try:
                sent.append(pickle.dumps((job.jinja, job.answer_choices, job.record, job.seed)))
                size += len(sent[-1])
            except RecursionError:
                job = Refused(FAILS, "the record is nested too deeply: flatten it")
        group.append((place, job))
        if len(group) == GROUP_JOBS or size >= GROUP_BYTES:
            yield from _answered(group, sent)
            group, sent, size = [], [], 0
    yield from _answered(group, sent)


def _answered(group: Sequence[tuple[Place, Render | Answer]], sent: Sequence[bytes]) -> Iterator[tuple[Place, Answer]]:
    found = iter(_process.run(sent))
    for place, job in group:
        yield place, _answer(job, next(found)) if isinstance(job, Render) else job


def _answer(job: Render, found: list[str] | Refused) -> Answer:
    if isinstance(found, Refused):
        failed = job.record and found.reason == FAILS
        fields = f": its records have {', '.join(job.record or ())}" if failed else ""
        return Refused(found.reason, f"template {job.name} {found.message}{fields}")
    if job.record is None or not any(found):
        return None
    if len(found) != 2:
        reason = "no |||" if len(found) == 1 else "more than one |||"
        return Refused(reason, f"template {job.name} gives {len(found) - 1} of ||| here: write prompt ||| answer")
    made = prompt(*found)
    return Refused(made.reason, f"template {job.name}: {made.message}") if isinstance(made, Refused) else made


def prompt(text: str, target: str) -> Prompt | Refused:
    """Return a prompt with its answer, or why they cannot be trained on."""
    if not target.strip():
        return Refused("empty answer", "the answer is empty: add it, or remove the record")
    if "\0" in text or "\0" in target:
        return Refused("NUL", "a NUL character: remove it")
    try:
        (text + target).encode("utf-8")
    except UnicodeEncodeError:  # a lone escape such as "\ud800"
        return Refused("invalid UTF-8", "half a surrogate pair: fix it")
    return text, target


class _Process:
    """The process that renders; started when it is first needed, and again after a job has ended it."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._process: subprocess.Popen[bytes] | None = None

    def run(self, jobs: Sequence[bytes]) -> list[list[str] | Refused]:
        """Return the parts that each job gives, or why it fails."""
        done: list[list[str] | Refused] = []
        together = len(jobs)
        with self._lock:
            try:
                while len(done) < len(jobs):
                    some = jobs[len(done) : len(done) + together]
                    found = self._exchange(some)
                    if isinstance(found, list):
                        done += found
                    elif len(some) == 1:
                        done.append(found)
                    else:
                        together = 1  # to find the one that ended the process
            except BaseException:  # answers may be on their way: the next call must not take them for its own
                self._stop(kill=True)
                raise
        return done

    def _exchange(self, jobs: Sequence[bytes]) -> list[list[str] | Refused] | Refused:
        """Send jobs and return their answers, or why one of them ended the process."""
        process = self._process or self._start()
        assert process.stdin is not None and process.stdout is not None  # they are pipes
        with contextlib.suppress(BrokenPipeError):  # then it has ended, which is told below
            pickle.dump(list(jobs), process.stdin)
            process.stdin.flush()
        line = process.stdout.readline()
        if not line.endswith(b"\n"):
            ending = _ending(process.wait())
            self._stop(kill=False)
            return ending
        return [found if isinstance(found, list) else Refused(**found) for found in json.loads(line)]

    def _start(self) -> subprocess.Popen[bytes]:
        if importlib.util.find_spec("jinja2") is None:
            raise missing("jinja2")
        command = [sys.executable, "-m", f"{__package__}.sandbox", str(SECONDS), str(MEMORY)]
        paths = os.pathsep.join(path or os.getcwd() for path in sys.path)
        with signals.blocked():
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                env={**os.environ, "PYTHONPATH": paths},
            )  # fmt: skip
        return self._process

    def _stop(self, *, kill: bool) -> None:
        process, self._process = self._process, None
        if process is None:
            return
        if kill:
            process.kill()
        with contextlib.suppress(BrokenPipeError):
            process.communicate()  # closes its stdin, at which it ends

    def close(self) -> None:
        """End the process, if there is one."""
        with self._lock:
            self._stop(kill=False)


def _ending(status: int) -> Refused:
    """Return what the exit status of the process says about the job that it was at."""
    if status == -signal.SIGPROF:
        return Refused(OVER_BUDGET, f"takes more than {SECONDS:g} s: simplify or remove it")
    if status == OVER_MEMORY or -status in CRASHES:
        return Refused(OVER_BUDGET, f"takes more than {MEMORY // 1_000_000} MB of memory: simplify or remove it")
    raise UserError(f"the process that renders templates was ended from outside (status {status}): start again")


def missing(package: str) -> UserError:
    """Return the error that says which package is not installed."""
    return UserError(f"instructions need the package {package}: pip install -e '.[instructions]'")


_process = _Process()
atexit.register(_process.close)
