"""JAX's profiler, for the steps that were asked for."""

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
        steps: the first and the last step to trace, numbered as in metrics.jsonl; empty: none. A run that resumes
            within the range traces the rest of it.
    """

    def __init__(self, workdir: Path, steps: tuple[int, int] | tuple[()]) -> None:
        self._folder, self._steps, self._tracing = workdir / FOLDER, steps, False

    def before(self, run: Run) -> None:
        """Begin the trace if the step that is about to run is to be traced."""
        if self._steps and not self._tracing and self._steps[0] <= run.step + 1 <= self._steps[1]:
            jax.profiler.start_trace(self._folder)
            self._tracing = True

    def after(self, step: Step) -> None:
        """End the trace once `step` was the last to be traced; waits for its results, as devices run behind."""
        if self._tracing and self._steps and step.number >= self._steps[1]:
            jax.block_until_ready(step.metrics)
            self.close()

    def close(self) -> None:
        """End the trace that is running, if any."""
        if self._tracing:
            self._tracing = False
            jax.profiler.stop_trace()
