"""Spikes: steps at which the loss or the gradient norm leaves its running band, as before a run diverges.

GLM-130B's operators watched both: the gradient norm jumped a few steps before the loss exploded. The remedy was to go
back to the last checkpoint and skip the data (training log, 12 June to 22 June 2022).
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import NamedTuple

from glm_jax.config import Experiment
from glm_jax.training.observers import Observer, Step


class Band(NamedTuple):
    """The exponentially weighted running mean and variance of a value, and how many steps they are made of."""

    mean: float = 0.0
    variance: float = 0.0
    steps: int = 0


class Bands(NamedTuple):
    """The bands of the loss, in nats, and of the natural logarithm of the gradient norm."""

    loss: Band = Band()
    grad_norm: Band = Band()

    def to_json(self) -> list[list[float]]:
        """Return what `from_json` takes."""
        return [list(band) for band in self]

    @classmethod
    def from_json(cls, values: Sequence[Sequence[float]] | None) -> Bands:
        """Return the bands that `to_json` wrote; those of the start for None or an empty list."""
        return cls(*(Band(mean, variance, int(steps)) for mean, variance, steps in values or ()))


def _grown(band: Band, value: float, window: int) -> Band:
    weight = 1.0 / min(band.steps + 1, window)  # a plain mean until the window is full
    distance = value - band.mean
    variance = (1.0 - weight) * (band.variance + weight * distance**2)
    return Band(band.mean + weight * distance, variance, band.steps + 1)


def _upper(band: Band, deviations: float) -> float:
    return band.mean + deviations * math.sqrt(band.variance)


def watch(config: Experiment, bands: Bands, loss: float, grad_norm: float) -> tuple[Bands, str | None]:
    """Compare one step's values with the bands, and update these.

    Args:
        config: its section `train.spike` sets how wide the bands are and how many steps they need first.
        bands: before the step.
        loss: nats a target token.
        grad_norm: global, before clipping. With a loss scale, one that is not finite is no spike: it lowers the scale.

    Returns:
        The bands after it, and why the step is a spike, or None. A spike does not change the bands.
    """
    cfg = config.train.spike
    scaled = config.train.precision == "float16"
    if not math.isfinite(loss):
        return bands, f"the loss is {loss}"
    if not math.isfinite(grad_norm) and not scaled:
        return bands, f"the gradient norm is {grad_norm}"
    limit = _upper(bands.loss, cfg.deviations)
    if bands.loss.steps >= cfg.window and loss > limit:
        return bands, f"the loss {loss:.4g} is above its band, which ends at {limit:.4g}"
    losses = _grown(bands.loss, loss, cfg.window)
    if not math.isfinite(grad_norm):
        return Bands(losses, bands.grad_norm), None
    height = math.log(max(grad_norm, 1e-30))
    limit = _upper(bands.grad_norm, cfg.deviations)
    if bands.grad_norm.steps >= cfg.window and height > limit:
        return bands, f"the gradient norm {grad_norm:.4g} is above its band, which ends at {math.exp(limit):.4g}"
    return Bands(losses, _grown(bands.grad_norm, height, cfg.window)), None


@dataclasses.dataclass(frozen=True)
class Spike:
    """A step whose loss or gradient norm left its band."""

    step: int
    loss: float  # nats a target token
    grad_norm: float
    reason: str


class Spikes(Observer):
    """Watches every step if the experiment asks for it; comes first, since going back undoes the step.

    While train.spike.rollbacks are left, the run goes back. Afterwards it only reports, once for spikes in a row.
    """

    def __init__(self) -> None:
        self._last: int | None = None  # the step of the last spike that was only reported

    def after(self, step: Step) -> None:
        run = step.run
        if not run.watches_spikes:
            return
        loss, grad_norm = step.loss, float(step.metrics["grad_norm"])
        run.bands, reason = watch(run.current, run.bands, loss, grad_norm)
        if reason is None:
            return
        seen = Spike(step.number, loss, grad_norm, reason)
        if run.current.train.spike.rollbacks:
            run.go_back(seen)
            return
        if self._last != step.number - 1:
            run.log({"event": "spike", **dataclasses.asdict(seen)})
            run.say(f"spike at step {step.number}: {reason}; train.spike.rollbacks are used up, the run continues")
        self._last = step.number
