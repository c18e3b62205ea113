"""Dead runs: stop a run whose steps have not been finite for a while, which no further step will mend."""

from __future__ import annotations

from glm_jax.training.observers import Observer, Step


class Health(Observer):
    """Counts the steps in a row that are not finite, each once the next is under way; fails at train.dead_after."""

    def __init__(self) -> None:
        self._latest: Step | None = None
        self._dead = 0

    def after(self, step: Step) -> None:
        latest, self._latest = self._latest, step
        if latest is None or latest.number >= step.number or latest.is_healthy():  # it went back
            self._dead = 0
            return
        self._dead += 1
        if 0 < step.run.current.train.dead_after <= self._dead:
            step.run.fail(
                f"the loss or the update has not been finite for {self._dead} steps, since step "
                f"{latest.number - self._dead + 1}"
            )
