"""Signals: SIGINT, SIGTERM and schedulers' own ask the run to stop with a checkpoint; a second SIGINT interrupts."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator
from types import FrameType

from glm_jax import signals


@contextlib.contextmanager
def listening(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at a signal while the block runs; a second SIGINT acts as before. Only the main thread can listen."""

    def note(number: int, frame: FrameType | None) -> None:
        stop()
        signal.signal(signal.SIGINT, second)

    second = signal.getsignal(signal.SIGINT)
    with signals.handled(note):
        yield
