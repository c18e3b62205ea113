"""The steps of a group that is not finished, in one file, so that it continues where it was interrupted or killed."""

from __future__ import annotations

import time
import zipfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np

from glm_jax.storage.files import open_atomic
from glm_jax.training.state import TrainState
from glm_jax.types import Tree

EVERY = 60.0  # seconds between savings, at least
SHARE = 0.05  # of the time that savings may take


class Steps(NamedTuple):
    """What the steps so far have left: what the next step needs, and what the results are made of.

    `metrics` has one tree for each step, of arrays [members, ...]; `counts` float64 [streams, V] are those of targets.
    """

    states: TrainState
    metrics: list[Tree]
    counts: np.ndarray


class Unfinished:
    """The file of one group.

    Args:
        path: of the file.
        digest: of the group's members; a file of other members is not used.
        clock: in seconds.
    """

    def __init__(self, path: Path, digest: str, clock: Callable[[], float] = time.monotonic) -> None:
        self.path, self._digest, self._clock = path, digest, clock
        self._next = clock() + EVERY

    def due(self) -> bool:
        """Whether it is time to save again."""
        return self._clock() >= self._next

    def save(self, steps: Steps) -> None:
        """Write all steps so far, whole or not at all."""
        started = self._clock()
        leaves = _stacked(steps)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open_atomic(self.path) as file:
            named = {f"leaf{place}": leaf for place, leaf in enumerate(leaves)}
            np.savez(file, allow_pickle=False, digest=np.array(self._digest), **named)
        self._next = self._clock() + max(EVERY, (self._clock() - started) / SHARE)

    def load(self, states: TrainState, metrics: Callable[[], Tree]) -> Steps | None:
        """Return the steps of the file, or None if there is none, or one that is damaged or of other members.

        Args:
            states: as they begin.
            metrics: returns a step's, of any values.
        """
        try:
            with open(self.path, "rb") as opened, np.load(opened) as file:  # np.load leaves a damaged file open
                if str(file["digest"]) != self._digest:
                    return None
                leaves = [file[f"leaf{place}"] for place in range(len(file.files) - 1)]
        except (OSError, ValueError, KeyError, EOFError, zipfile.BadZipFile):
            return None
        of_states, of_metrics = jax.tree.structure(states), jax.tree.structure(metrics())
        counts, *leaves = leaves
        kept, stacked = leaves[: of_states.num_leaves], leaves[of_states.num_leaves :]
        taken = [jax.tree.unflatten(of_metrics, [leaf[step] for leaf in stacked]) for step in range(len(stacked[0]))]
        return Steps(jax.tree.unflatten(of_states, kept), taken, counts)

    def remove(self) -> None:
        """Remove the file: the group is finished."""
        self.path.unlink(missing_ok=True)


def _stacked(steps: Steps) -> Sequence[np.ndarray]:
    """Return the counts, the leaves of the states, and those of the metrics with the steps in front [T, ...]."""
    metrics = jax.tree.map(lambda *of_steps: np.stack(of_steps), *steps.metrics)
    return [steps.counts, *jax.tree.leaves(jax.device_get(steps.states)), *jax.tree.leaves(metrics)]
