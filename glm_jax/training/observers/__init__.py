"""Observers act after each step of a run: logging, evaluation, saving, spikes, the profiler, and a user's own."""

from __future__ import annotations

import dataclasses
import enum
import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from glm_jax.engine import loss_metrics
from glm_jax.types import Json, Tree

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Request(enum.IntEnum):
    """What a process may ask of all processes. The largest request of a step wins; it is met then or a step later."""

    NOTHING = 0
    SAVE = 1
    STOP = 2


@dataclasses.dataclass(frozen=True)
class Step:
    """A finished step.

    Attributes:
        run: the run that took it.
        number: of the step, counted from 1.
        samples: rows seen by its end.
        metrics: as `training.step.train_step` returns them: arrays on the mesh, perhaps still computing.
        settings: chosen by recipe.py: `lr`, `embedding_shrink`, `batch`.
        request: the one to meet now.
    """

    run: Run
    number: int
    samples: int
    metrics: Mapping[str, Tree]
    settings: Mapping[str, float]
    request: Request

    @property
    def loss(self) -> float:
        """The loss in nats a target token; waits for the step."""
        return loss_metrics(self.metrics["sums"])["loss"]

    def is_healthy(self) -> bool:
        """Whether loss, gradients and update are finite, or the loss scale can still fall; waits for the step."""
        values = (self.loss, float(self.metrics["grad_norm"]), float(self.metrics["update_norm"]))
        scaling = self.run.current.train.scaling()
        falls = scaling is not None and float(self.metrics["loss_scale"]) > scaling.minimum
        return falls or all(map(math.isfinite, values))

    def is_due(self, every: int) -> bool:
        """Whether something that happens every `every` steps and after the last one happens now."""
        return self.number % every == 0 or self.number == self.run.current.train.steps

    def event(self) -> Json:
        """Return the step's metrics as an event for the log; waits for the step."""
        dimensions = {name: getattr(value, "ndim", None) for name, value in self.metrics.items()}
        values = {name: float(self.metrics[name]) for name, count in dimensions.items() if count == 0}
        by_layer = {name: list(map(float, self.metrics[name])) for name, count in dimensions.items() if count == 1}
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
            **by_layer,
        }


class Observer:
    """Base class of observers, which are called at every step; override what is needed.

    A run calls `Run.observers` in order. They may call its `evaluate`, `save`, `stop`, `go_back`, `log` and `say`.
    """

    def before(self, run: Run) -> None:
        """Act before step `run.step + 1`."""

    def after(self, step: Step) -> None:
        """Act after a step. Its arrays may still be computing; reading one waits for it."""

    def skipped(self, run: Run) -> None:
        """Act after steps up to `run.step` were skipped with their data."""

    def close(self) -> None:
        """Close what is open; no further step follows."""
