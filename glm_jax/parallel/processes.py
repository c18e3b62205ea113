"""Runs of several processes: joining, waiting for one another, and noticing that one is gone."""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import re
import signal
import sys
import time
import traceback
import weakref
from collections.abc import Callable
from typing import ParamSpec, Protocol, TypeVar

import jax

from glm_jax.errors import UserError
from glm_jax.parallel.schedulers import joins
from glm_jax.types import Tree

P = ParamSpec("P")  # what a function takes
R = TypeVar("R", covariant=True)  # and what it returns

LOST = 1  # the exit code when another process is gone
HOUR = 3600  # seconds to wait for what others may do before they arrive: fetching, tokenising, compiling
HEARTBEAT = 10  # seconds that a busy machine may take between two signs of life

# What jax, gloo, NCCL and the coordination service say when another process does not answer.
_GONE = re.compile("gloo|nccl|barrier|heartbeat|coordination|connection|unavailable|deadline", re.IGNORECASE)
_barriers = itertools.count()


class Gone(Exception):
    """Another process has stopped and has said why."""


def start(coordinator: str | None, count: int | None, index: int | None, timeout: float) -> None:
    """Join a run of several processes. Call it before anything touches a device; for a single process it does nothing.

    Args:
        coordinator: host:port of process 0, which all processes can reach. All three are None to ask the scheduler.
        count: the number of processes.
        index: of this process.
        timeout: seconds after which a silent process counts as gone: in a collective on CPU, and anywhere without a
            sign of life (then at least `HEARTBEAT`).

    Raises:
        UserError: some of the three are missing or invalid, or the processes do not find one another.
    """
    given = [coordinator is not None, count is not None, index is not None]
    if any(given) and not all(given):
        raise UserError("--coordinator, --processes and --process go together: give all three, or none")
    if not joins(coordinator):
        return
    if count is not None and index is not None and not 0 <= index < count:
        raise UserError(f"--process={index} of --processes={count}: they count from 0 to {count - 1}")
    if coordinator is not None and not re.fullmatch(r".+:\d+", coordinator):
        raise UserError(
            f"--coordinator={coordinator} is not HOST:PORT: name the host of process 0 and a free port on it"
        )
    flag = f"--xla_cpu_collective_timeout_seconds={max(1, round(timeout))}"
    os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.config.update("jax_enable_preemption_service", False)  # the loop handles signals
    try:
        jax.distributed.initialize(coordinator, count, index, heartbeat_timeout_seconds=max(HEARTBEAT, round(timeout)))
    except (RuntimeError, ValueError) as error:
        where = coordinator or "the address that the scheduler gives"
        raise UserError(
            f"the processes did not find one another at {where} ({_short(error)}): have all of them started?"
        ) from error
    _exit_on_abort()


_decided: tuple[str, int] | None = None  # the last line and the exit code of a process about to exit


def _decide(line: str, code: int) -> None:
    """Settle the last line and exit code of this process, whatever ends it: the others may exit first."""
    global _decided
    _decided = line, code


@ctypes.CFUNCTYPE(None, ctypes.c_int)
def _aborted(number: int) -> None:
    lost = "error: aborted, most likely because another process is gone: start all again with the same command"
    _leave(*(_decided or (lost, LOST)))


def _exit_on_abort() -> None:
    """Exit with our line and code when jax aborts this process from a thread of its own.

    jax does so in a process that is in no collective, where there is no error to catch: at once if process 0 is gone,
    or when another process shows no sign of life. Python's signal handlers run in the main thread, too late.
    """
    ctypes.CDLL(None).signal(signal.SIGABRT, _aborted)


def alone() -> bool:
    """Whether this process is the whole run."""
    return jax.process_count() == 1


def is_first() -> bool:
    """Whether this is the process that prints and writes for all."""
    return jax.process_index() == 0


def wait_for_all() -> None:
    """Wait until every process has reached this call. Unlike a collective, it waits for up to an hour.

    Raises:
        Gone: another process has stopped with an error of its own.
        jax.errors.JaxRuntimeError: another process is gone without saying why.
    """
    if not alone():
        from orbax.checkpoint import multihost

        key = f"glm_jax_{next(_barriers)}"
        wait = multihost.get_barrier_sync_fn()
        wait(key=key, timeout_ms=HOUR * 1000)
        if reasons := multihost.get_jax_distributed_client().key_value_dir_get(f"{key}_stopped/"):
            _decide(_stopped(min(reasons)[1]), LOST)
            with contextlib.suppress(jax.errors.JaxRuntimeError):  # that one may exit before the answer arrives
                wait(key=f"{key}_told", timeout_ms=HOUR * 1000)
            raise Gone(min(reasons)[1])


class Jitted(Protocol[P, R]):
    """What `jax.jit` returns; to lower it, shapes are enough."""

    def __call__(self, *arguments: P.args, **named: P.kwargs) -> R: ...
    def lower(self, *arguments: Tree, **named: Tree) -> jax.stages.Lowered: ...


_compiled: weakref.WeakKeyDictionary[object, set[tuple[object, ...]]] = weakref.WeakKeyDictionary()


def compiled_together(function: Jitted[P, R]) -> Callable[P, R]:
    """Return a jitted function that all processes call alike.

    Before the first call with new shapes or static arguments it compiles, and waits until all processes have:
    collectives wait less long (gloo waits half a minute for a connection).
    """
    if alone():
        return function
    seen = _compiled.setdefault(function, set())

    def call(*arguments: P.args, **named: P.kwargs) -> R:
        leaves = jax.tree.leaves((arguments, named))
        shapes = tuple(leaf.shape if hasattr(leaf, "dtype") else leaf for leaf in leaves)  # the others are static
        if shapes not in seen:
            function.lower(*arguments, **named).compile()
            wait_for_all()
            seen.add(shapes)
        return function(*arguments, **named)

    return call


def together(run: Callable[[], int]) -> int:
    """Do this process's part of a run, and return its exit code.

    In a run of several processes an error ends this process at once: an orderly exit would wait for the others, which
    may be waiting for this one. It prints one line if the mistake is the user's or if another process is gone. The
    others are told why.
    """
    try:
        return run()
    except (Exception, KeyboardInterrupt) as error:
        if alone():
            raise
        if isinstance(error, UserError):
            _decide(f"error: {error}", 2)
            _tell(str(error))
            _leave(f"error: {error}", 2)
        if isinstance(error, KeyboardInterrupt):
            _leave("interrupted; what was finished is kept", 130)
        if isinstance(error, Gone):
            _leave(_stopped(str(error)), LOST)
        # outside jit a collective's error is a ValueError
        if isinstance(error, (jax.errors.JaxRuntimeError, ValueError)) and _GONE.search(str(error)):
            _leave(f"error: another process is gone ({_short(error)}): start all again with the same command", LOST)
        _decide(traceback.format_exc(), LOST)
        _tell(f"{type(error).__name__}, see there")
        _leave(traceback.format_exc(), LOST)
        raise


def _tell(reason: str) -> None:
    """Leave the others a message, and meet them at the barrier after which they read it."""
    from orbax.checkpoint import multihost

    client, wait = multihost.get_jax_distributed_client(), multihost.get_barrier_sync_fn()
    key = f"glm_jax_{next(_barriers)}"
    try:
        client.key_value_set(f"{key}_stopped/{jax.process_index()}", f"process {jax.process_index()}: {reason}")
        for meeting in (key, f"{key}_told"):
            wait(key=meeting, timeout_ms=HEARTBEAT * 1000)
        if is_first():
            time.sleep(1)  # the service that the others read from ends with this process
    except jax.errors.JaxRuntimeError:
        return  # the others are in a collective, which ends with its own error


def _stopped(reason: str) -> str:
    return f"error: another process has stopped ({reason}): fix it, then start all again"


def _short(error: BaseException) -> str:
    return str(error).splitlines()[0][:160]


def _leave(line: str, code: int) -> None:
    """Exit without waiting for others, as threads that save and jax's shutdown would."""
    sys.stdout.flush()
    os.write(2, f"{line.rstrip()}\n".encode())
    os._exit(code)
