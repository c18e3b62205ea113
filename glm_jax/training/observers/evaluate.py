"""Evaluation during a run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from glm_jax.training.observers import Observer, Step

if TYPE_CHECKING:
    from glm_jax.training.run import Run


class Evaluate(Observer):
    """Runs the evaluators every train.eval_every steps and after the last one; 0 disables it.

    It comes before `Save`, so that the log has the evaluation of each checkpoint's step.
    """

    def after(self, step: Step) -> None:
        if (every := step.run.current.train.heldout_every()) and step.is_due(every):
            step.run.evaluate()

    def skipped(self, run: Run) -> None:
        """Evaluate at the run's end: every run is."""
        if run.step == run.current.train.steps and run.current.train.heldout_every():
            run.evaluate()
