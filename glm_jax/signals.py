"""The signals by which people and schedulers end a command."""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType

ENDING = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)  # the last two come before a job's time limit


@contextlib.contextmanager
def handled(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Call `handler` at each of ENDING while the block runs; an ignored one, as SIGHUP under nohup, stays ignored.

    Only the main thread can handle signals; elsewhere the block runs as it is.
    """
    main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in ENDING if main}
    for number, other in before.items():
        if other is not signal.SIG_IGN:
            signal.signal(number, handler)
    try:
        yield
    finally:
        for number, other in before.items():
            signal.signal(number, other)
