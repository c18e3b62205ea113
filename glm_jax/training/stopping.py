"""A request that a run stops. In a loop of the user's own only SIGINT (Ctrl-C) matters, see `signals.deferred`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator


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
