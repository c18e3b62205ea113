"""The signals by which people and schedulers end a command, and what they do to it."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import NoReturn

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last two come before a job's time limit
INTERRUPTED = 130  # exit code
LINE = "interrupted; what was finished is kept"

Handler = Callable[[int, FrameType | None], None]


def leave() -> NoReturn:
    """End the process at once: nothing has begun, or nobody wants to wait any longer."""
    with contextlib.suppress(OSError):  # standard error is closed, or its disk is full
        os.write(2, f"{LINE}\n".encode())
    os._exit(INTERRUPTED)


class Interrupt:
    """The handler of a command: the first signal raises KeyboardInterrupt, the third ends the process at once.

    The second is let pass, so that it does not interrupt what the first one made tidy up. While a module is imported,
    the first ends the process, since extension modules turn the exception into other errors, or abort.

    Attributes:
        received: signals so far, including those that asked a run to stop.
    """

    def __init__(self) -> None:
        self.received, self._raised = 0, False

    def __call__(self, number: int, frame: FrameType | None) -> None:
        self.received += 1
        if self.received > 2 or _imports(frame):
            leave()
        if not self._raised:
            self._raised = True
            raise KeyboardInterrupt


def _imports(frame: FrameType | None) -> bool:
    """Whether a module is being imported in this frame or in one that called it."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            return True
        frame = frame.f_back
    return False


def handle(handler: Handler) -> dict[signal.Signals, Handler | int | None]:
    """Call `handler` at each of ENDING, and return the handlers before; an ignored one, as under nohup, stays ignored.

    Only the main thread can handle signals; elsewhere nothing changes.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if main}
    for number, other in before.items():
        if other is not signal.SIG_IGN:
            signal.signal(number, handler)
    return before


@contextlib.contextmanager
def handled(handler: Handler) -> Iterator[None]:
    """Call `handler` at each of ENDING while the block runs, as `handle` does."""
    before = handle(handler)
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)


@contextlib.contextmanager
def blocked() -> Iterator[None]:
    """Start processes in which ENDING are blocked for good: this process decides when they end.

    A terminal and most schedulers send signals to all processes of a command. Without this, those that it started might
    end first, with a traceback, or look as if they had failed.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, ENDING)
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def listening(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at a signal while the block runs; a second SIGINT acts as before. Only the main thread can listen."""
    before, asked = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            if isinstance(before, Interrupt):
                before.received += 1
            signal.signal(signal.SIGINT, before)
        stop()

    with handled(note):
        yield


@contextlib.contextmanager
def deferred() -> Iterator[None]:
    """Let a SIGINT that would raise KeyboardInterrupt raise it when the block has ended; a second one does not wait."""
    main = threading.current_thread() is threading.main_thread()
    if not main or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:
        yield
        return
    asked = False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        asked = True
        signal.signal(signal.SIGINT, signal.default_int_handler)

    signal.signal(signal.SIGINT, note)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, signal.default_int_handler)
    if asked:
        raise KeyboardInterrupt


class _Ended(BaseException):
    """A signal came that ends the command."""


@contextlib.contextmanager
def cancelling() -> Iterator[None]:
    """Let every SIGINT in the block raise KeyboardInterrupt, which the block may catch to cancel what it does.

    Any other of ENDING raises KeyboardInterrupt when the block has been left. A signal waits while a module is
    imported, see `Interrupt`.
    """

    def act(number: int, frame: FrameType | None) -> None:
        if _imports(frame):
            threading.Timer(0.05, os.kill, (os.getpid(), number)).start()
            return
        raise KeyboardInterrupt if number == signal.SIGINT else _Ended

    try:
        with handled(act):
            yield
    except _Ended:
        raise KeyboardInterrupt from None
