"""Signals: the first SIGINT or SIGTERM asks the run to stop with a checkpoint, a second SIGINT interrupts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType


@contextlib.contextmanager
def listening(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at the first signal while the block runs. Only the main thread can listen."""

    def note(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, signal.default_int_handler)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
