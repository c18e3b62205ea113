"""Evaluation during a run."""

from __future__ import annotations

from glm_jax.training.observers import Observer, Step


class Evaluate(Observer):
    """Runs the evaluators every train.eval_every steps and after the last one; 0 disables it.

    It comes before `Save`, so that the log has the evaluation of each checkpoint's step.
    """

    def after(self, step: Step) -> None:
        if (every := step.run.current.train.eval_every) and step.is_due(every):
            step.run.evaluate()
