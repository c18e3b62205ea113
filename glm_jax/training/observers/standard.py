"""The observers of every run, in the order in which they are called."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from glm_jax.training.observers import Observer
from glm_jax.training.observers.evaluate import Evaluate
from glm_jax.training.observers.health import Health
from glm_jax.training.observers.log import Log
from glm_jax.training.observers.profile import Profile
from glm_jax.training.observers.save import Save
from glm_jax.training.observers.spikes import Spikes


def standard(workdir: Path, profiled: tuple[int, int] | tuple[()], more: Iterable[Observer]) -> list[Observer]:
    """Return the observers of a run.

    Args:
        workdir: of the run.
        profiled: the first and the last step to trace; () for none.
        more: those that come before `Save`, so that the log has what they say of each checkpoint's step.
    """
    return [Profile(workdir, profiled), Spikes(), Health(), Log(), Evaluate(), *more, Save()]
