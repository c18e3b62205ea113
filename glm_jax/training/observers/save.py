"""Checkpoints, by steps and by the clock; none of a step that is not finite."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from glm_jax.parallel import processes
from glm_jax.training.observers import Observer, Request, Step

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Save(Observer):
    """Saves every train.save_every steps and on request, and logs how earlier saves ended.

    A step that is not finite is not saved, so that no checkpoint from before it is removed; the next finite one is.
    """

    def __init__(self) -> None:
        self._postponed = False

    def before(self, run: Run) -> None:
        """Request a save every train.save_minutes, by the clock of the first process."""
        minutes, passed = run.current.train.save_minutes, time.monotonic() - run.saved_at
        if minutes and processes.is_first() and passed > 60 * minutes:
            run.ask(Request.SAVE)

    def after(self, step: Step) -> None:
        run = step.run
        for event in run.checkpoints.events():
            run.log(event)
        if self._postponed or step.number % run.current.train.save_every == 0 or step.request == Request.SAVE:
            healthy = step.is_healthy()
            if healthy:
                run.save()
            elif not self._postponed:
                run.say(f"step {step.number} is not saved: its loss or its update is not finite")
            self._postponed = not healthy
