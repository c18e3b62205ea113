"""Tasks that a config names as evaluators: looked up for `train` and `glm_jax.load`, and handed to the run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax.config import Experiment
from glm_jax.config.fields import closest
from glm_jax.config.training import HELDOUT
from glm_jax.errors import UserError
from glm_jax.evaluation.tasks.names import NAMES, is_name

if TYPE_CHECKING:
    from glm_jax.training.observers import Observer
    from glm_jax.training.stretch import Stretch


def check(config: Experiment) -> None:
    """Refuse an evaluator that is neither a name nor a file. Does not import jax."""
    for place, _ in config.train.tasks():
        if not is_name(place) and not Path(place).expanduser().is_file():
            hint = closest(place, [HELDOUT, *NAMES], "evaluate --help")
            raise UserError(f"train.evaluators names {place}, which is no task and no task file: {hint}")


def observers(config: Experiment) -> list[Callable[[Stretch], Observer]]:
    """Return what makes the observer of the tasks; empty if the config names none.

    Raises:
        UserError: a task is unknown, or its file or its data are wrong.
    """
    if not config.train.tasks():
        return []
    check(config)

    from glm_jax.evaluation import during

    return [during.observer(config)]
