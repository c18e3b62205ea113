"""JAX's profiler, for a range of steps."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import jax

from glm_jax.training.observers import Observer, Step

if TYPE_CHECKING:
    from glm_jax.training.run import Run

FOLDER = "profile"


class Profile(Observer):
    """Traces a range of steps into the workdir's profile/, for TensorBoard or XProf.

    Args:
        workdir: of the run.
        steps: the first and the last step to trace, numbered as in metrics.jsonl; () disables it. A run that
            resumes within the range traces the rest of it.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | tuple[()]) -> None:
        self._folder, self._steps, self._tracing = workdir / FOLDER, steps, False

    def before(self, run: Run) -> None:
        """Start the trace if the coming step is in the range."""
        if self._steps and not self._tracing and self._steps[0] <= run.step + 1 <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: Step) -> None:
        """Stop the trace after the last step of the range; first wait for its results, since devices run behind."""
        if self._tracing and self._steps and step.number >= self._steps[1]:
            jax.block_until_ready(step.metrics)
            self.close()

    def close(self) -> None:
        """Stop the trace if one is running."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
