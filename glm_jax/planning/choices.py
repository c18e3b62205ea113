"""Which meshes and weights let a model generate text in the memory of a device."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from glm_jax.config import Experiment, with_changes
from glm_jax.errors import UserError
from glm_jax.parallel.device_sheet import Device
from glm_jax.planning import generation, tracing
from glm_jax.planning.generation import Plan
from glm_jax.planning.programs import BITS, Inference, Weights, half

COUNTS = (1, 2, 4, 8, 16)  # devices


@dataclasses.dataclass(frozen=True)
class Choice:
    """Weights on a mesh.

    Attributes:
        experiment: with this mesh.
        inference: with these weights.
        weights: bytes a device.
        cache: bytes a device.
        plan: the estimate; None if weights and cache alone are too much.
        fits: whether the estimate fits.
    """

    experiment: Experiment
    inference: Inference
    weights: int
    cache: int
    plan: Plan | None
    fits: bool

    @property
    def devices(self) -> int:
        """The number of devices of the mesh."""
        return math.prod(self.experiment.mesh.sizes().values())


def kinds(device: Device) -> tuple[Weights, ...]:
    """Return the weights to choose from, the most precise first."""
    return ("float32", half(tpu=tracing.platform(device) == "tpu"), "int8", "int4")


def choices(
    experiment: Experiment, inference: Inference, device: Device, pieces: int, memory: int,
    counts: Sequence[int] = COUNTS,
) -> Iterator[Choice]:  # fmt: skip
    """Yield what there is to choose from, the most precise weights first, each on few devices first.

    Meshes that do not fit the model are left out. The axis `data` stays 1: copies of a model take no less of a device.

    Args:
        experiment: resolved; its own mesh is not used.
        inference: rows and room; `group` holds for int4, and for int8 unless it is None.
        device: of all.
        pieces: of the tokenizer.
        memory: bytes of a device.
        counts: of devices.
    """
    for kind in kinds(device):
        wanted = dataclasses.replace(inference, weights=kind, group=inference.group if kind in BITS else None)
        for count in counts:
            for tensor in (size for size in range(count, 0, -1) if count % size == 0):
                mesh = {"mesh.data": 1, "mesh.pipeline": count // tensor, "mesh.tensor": tensor}
                try:
                    yield choice(with_changes(experiment, mesh), wanted, device, pieces, memory)
                except UserError:  # it does not divide the model
                    continue


def choice(experiment: Experiment, inference: Inference, device: Device, pieces: int, memory: int) -> Choice:
    """Judge weights on an experiment's own mesh.

    Raises:
        UserError: the model does not fit the mesh, or cannot be quantised so.
    """
    bound = generation.bind(experiment, inference, device, pieces)
    held, cache = generation.weight_bytes(bound), generation.cache_bytes(bound)
    weights = held.outer + held.layers
    plan = generation.plan(experiment, inference, device, pieces) if weights + cache <= memory else None
    fits = plan is not None and plan.memory.total <= memory
    return Choice(experiment, inference, weights, cache, plan, fits)


def best(found: Sequence[Choice]) -> list[Choice]:
    """Return for each kind of weights the fastest mesh of the fewest devices that fits, the fewest devices first.

    With as many devices the more precise weights come first. Where rates are unknown, the fastest is the smallest.
    """
    least: dict[Weights, Choice] = {}
    for one in found:
        if one.fits:
            kept = least.setdefault(one.inference.weights, one)
            if (one.devices, _cost(one)) < (kept.devices, _cost(kept)):
                least[one.inference.weights] = one
    return sorted(least.values(), key=lambda one: one.devices)


def _cost(choice: Choice) -> float:
    """Return the seconds of a token at the upper bound, or bytes a device."""
    assert choice.plan is not None
    slowest = choice.plan.slowest
    return choice.plan.memory.total if slowest is None else 1 / slowest.tokens_per_second
