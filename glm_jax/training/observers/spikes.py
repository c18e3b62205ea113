"""Spikes of the loss or the gradient norm: go back to the last good checkpoint, or say that the run goes on."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from glm_jax.training import spike
from glm_jax.training.observers import Observer

if TYPE_CHECKING:
    from glm_jax.training.run import Step


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm left its band."""

    step: int
    loss: float  # nats a target token
    grad_norm: float
    reason: str


class Spikes(Observer):
    """Watches every step where the experiment asks for it; it comes first, as a step that is gone back from is undone.

    With train.spike.rollbacks left the run goes back; when they are used up it is told once for spikes in a row.
    """

    def __init__(self) -> None:
        self._last: int | None = None  # the step of the last spike that was not gone back from

    def after(self, step: Step) -> None:
        run = step.run
        if not run.watches_spikes:
            return
        loss, grad_norm = step.loss, float(step.metrics["grad_norm"])
        run.bands, reason = spike.watch(run.current, run.bands, loss, grad_norm)
        if reason is None:
            return
        seen = Spike(step.number, loss, grad_norm, reason)
        if run.current.train.spike.rollbacks:
            run.go_back(seen)
            return
        if self._last != step.number - 1:
            run.log({"event": "spike", **dataclasses.asdict(seen)})
            run.say(f"spike at step {step.number}: {reason}; train.spike.rollbacks are used up, the run continues")
        self._last = step.number
