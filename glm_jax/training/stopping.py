"""How a run is stopped: SIGINT, SIGTERM and schedulers' own signals ask for a checkpoint; a second SIGINT interrupts.

In a loop of the user's own only SIGINT (Ctrl-C) matters, and waits for the end of the step.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import TYPE_CHECKING

from glm_jax import signals
from glm_jax.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from glm_jax.training.run import Run

DONE, STOPPED, FAILED = 0, 3, 4  # exit codes


class Stop:
    """A process's own request that its run stops.

    Attributes:
        asked: whether it was made.
    """

    def __init__(self) -> None:
        self.asked, self._interrupts = False, False

    def ask(self) -> None:
        """Make the request; raises KeyboardInterrupt within `interrupting`."""
        self.asked = True
        if self._interrupts:
            self._interrupts = False
            raise KeyboardInterrupt

    @contextlib.contextmanager
    def interrupting(self, interrupts: bool) -> Iterator[None]:
        """Let a request interrupt the block, which may take hours, if `interrupts`."""
        self._interrupts = interrupts
        try:
            if self.asked and interrupts:
                raise KeyboardInterrupt
            yield
        finally:
            self._interrupts = False


def go(run: Run, afterwards: Callable[[], None] = lambda: None) -> int:
    """Take all remaining steps, close the run and return the exit code; a signal stops it with a checkpoint.

    Args:
        run: as it was opened.
        afterwards: called when the last step is saved, unless there was a signal.

    Raises:
        UserError: the last step could not be saved.
    """
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        run.stop()

    with listening(stop):  # to the end: no signal may change the exit code of what is saved
        try:
            with run:
                for _ in run.steps():
                    pass
        except WorkFailed as error:
            run.say(f"failed: {error}")
            return FAILED
        if unsaved := run.checkpoints.unsaved():
            raise UserError(f"step {run.step} could not be saved ({unsaved}): fix that, then the same command "
                            "resumes from the newest checkpoint")  # fmt: skip
        if run.step < run.current.train.steps:
            run.say(f"stopped: step {run.step} is saved in {run.workdir}; the same command resumes from there")
            return STOPPED
    if not asked:
        afterwards()
    return DONE


@contextlib.contextmanager
def listening(stop: Callable[[], None]) -> Iterator[None]:
    """Call `stop` at a signal while the block runs; a second SIGINT acts as before. Only the main thread can listen."""
    before, asked = signal.getsignal(signal.SIGINT), False

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal asked
        if not asked:
            asked = True
            if isinstance(before, signals.Interrupt):
                before.received += 1
            signal.signal(signal.SIGINT, before)
        stop()

    with signals.handled(note):
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
