"""Observers look at a run after each step: the log, evaluation, saving, spikes, the profiler, and a user's own."""

from __future__ import annotations

import dataclasses
import enum
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from glm_jax.engine import loss_metrics

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Request(enum.IntEnum):
    """What a process may ask of all. The largest request of a step holds; it is met after that step or the next."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """A step that was taken.

    Attributes:
        run: whose it is.
        number: of the step, from 1.
        samples: rows seen after it.
        metrics: what `training.step.train_step` returned: arrays on the mesh, perhaps still being computed.
        settings: what recipe.py chose for it: `lr`, `embedding_shrink`, `batch`.
        request: the request that is met now.
    """

    run: Run
    number: int
    samples: int
    metrics: Mapping[str, Any]
    settings: Mapping[str, float]
    request: Request

    @property
    def loss(self) -> float:
        """The loss in nats a target token; waits for the step."""
        return loss_metrics(self.metrics["sums"])["loss"]

    def is_due(self, every: int) -> bool:
        """Whether what happens every so many steps, and after the last one, happens now."""
        return self.number % every == 0 or self.number == self.run.current.train.steps

    def event(self) -> dict[str, Any]:
        """Return the step's metrics as the log has them; waits for the step."""
        values = {name: float(value) for name, value in self.metrics.items() if getattr(value, "ndim", None) == 0}
        del values["requests"]
        whole = {name: int(values[name]) for name in ("tokens", "skipped")}
        return {
            "event": "train",
            "step": self.number,
            "samples": self.samples,
            **loss_metrics(self.metrics["sums"]),
            **values,
            **whole,
            "embedding_shrink": self.settings["embedding_shrink"],
            "batch": self.settings["batch"],
            "activation_rms": [float(value) for value in self.metrics["activation_rms"]],
        }


class Observer:
    """Something that is told of every step; override what is needed.

    `Run.observers` are called in their order. What they may do to the run: `evaluate`, `save`, `stop`, `go_back`,
    `log`, `say`.
    """

    def before(self, run: Run) -> None:
        """Look at the run before the step `run.step + 1`."""

    def after(self, step: Step) -> None:
        """Look at a step that was taken. Its arrays may still be computed; to read one waits for it."""

    def close(self) -> None:
        """End what is open, as no further step comes."""
