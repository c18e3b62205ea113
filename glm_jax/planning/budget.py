"""What a run costs: steps and days for a number of tokens, checkpoints, energy and carbon."""

from __future__ import annotations

import dataclasses
import math
from typing import NamedTuple

import jax

from glm_jax.config import Experiment, recipe
from glm_jax.training.state import StepConfig, init_state

DAY = 86_400  # seconds
CARBON = 0.5810  # kg of CO2 a kWh, which the paper takes (appendix H); another grid has another
WRITES = 1e9  # bytes/s that the devices of one node write to storage together: an assumption


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What a save writes, and how long that takes; training goes on meanwhile."""

    bytes: int
    seconds: float


class Energy(NamedTuple):
    """What devices use, without the rest of their machines."""

    kilowatt_hours: float
    carbon_kilograms: float


def steps_for(experiment: Experiment, tokens: float) -> int:
    """Return the number of steps that a number of row tokens takes, with the batch ramp."""
    return recipe.steps_for(experiment, math.ceil(tokens / experiment.data.seq_length))


def tokens_of(experiment: Experiment) -> int:
    """Return the row tokens of all steps of an experiment."""
    return recipe.total_samples(experiment) * experiment.data.seq_length


def days_for(tokens: float, tokens_per_second: float) -> float:
    """Return the days that a number of tokens takes, without restarts."""
    return tokens / tokens_per_second / DAY


def energy(devices: int, watts: float, days: float, carbon: float = CARBON) -> Energy:
    """Return what devices use in so many days (paper, appendix H).

    Args:
        devices: how many.
        watts: of each, under load.
        days: that they run.
        carbon: kg of CO2 a kWh.
    """
    kilowatt_hours = devices * watts * 24 * days / 1000
    return Energy(kilowatt_hours, carbon * kilowatt_hours)


def checkpoint(cfg: StepConfig, devices: int, node: int | None, writes: float = WRITES) -> Checkpoint:
    """Return what a save writes: the state with its true layers, as on disk. Orbax compresses it by little.

    Args:
        cfg: of the step.
        devices: of the mesh, which write together.
        node: devices a node; None if all are in one.
        writes: bytes/s of a node.
    """
    shapes = jax.eval_shape(lambda: init_state(cfg))
    size = sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(shapes))
    nodes = math.ceil(devices / (node or devices))
    return Checkpoint(size, size / (nodes * writes))
