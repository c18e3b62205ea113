"""Signals: SIGINT, SIGTERM and schedulers' own ask the run to stop with a checkpoint; a second SIGINT interrupts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

STOPPING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)


@contextlib.contextmanager
def listening(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at a signal while the block runs; a second SIGINT acts as before. Only the main thread can listen."""

    def note(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, before[signal.SIGINT])

    before = {number: signal.getsignal(number) for number in STOPPING}
    for number in STOPPING:
        if before[number] is not signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, note)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
