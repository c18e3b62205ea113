"""The log: an event every few steps, and the progress on the console."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm_jax.training.observers import Observer, Step

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Log(Observer):
    """Logs every train.log_every steps and the last one, with the speed since the last event; shows the progress."""

    def before(self, run: Run) -> None:
        if not run.stretch.compiled:
            run.say("compiling the training step")
            run.stretch.compiled = True

    def after(self, step: Step) -> None:
        run, event = step.run, None
        if step.is_due(run.current.train.log_every):
            event = step.event() | run.stretch.meter.read()
            run.log(event)
        run.monitor.progress(1, event)
