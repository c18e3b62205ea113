"""Evaluators, the parts of an evaluation; the held-out loss is the first."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Protocol

from glm_jax.types import Json

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Evaluator(Protocol):
    """One part of an evaluation."""

    def __call__(self, run: Run, /) -> Mapping[str, float]:
        """Measure the run's current params; return values under names that no other evaluator uses."""
        ...


def event(run: Run) -> Json:
    """Call the run's evaluators, and return their values as an event."""
    values: dict[str, float] = {}
    for evaluator in run.evaluators:
        values |= {name: float(value) for name, value in evaluator(run).items()}
    return {"event": "evaluation", "step": run.step, **values}


def heldout(run: Run) -> dict[str, float]:
    """Return the held-out losses, see `HeldOut.losses`."""
    return run.stretch.heldout(run.state.params, run.base)
