"""The mesh: axes `data`, `pipeline` and `tensor` over the devices, and batches placed on it."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import jax
import numpy as np

from glm_jax.errors import UserError
from glm_jax.parallel import partition

AXES = ("data", "pipeline", "tensor")


def build(sizes: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> jax.sharding.Mesh:
    """Build the mesh; a laptop is 1 x 1 x 1.

    Args:
        sizes: the size of each of `AXES`.
        devices: to lay the mesh over, the first ones are taken; by default every device there is.

    Raises:
        UserError: fewer devices than the sizes ask for.
    """
    devices = list(jax.devices() if devices is None else devices)
    shape = tuple(sizes[axis] for axis in AXES)
    needed = int(np.prod(shape))
    if needed > len(devices):
        shown = " x ".join(f"mesh.{axis}={sizes[axis]}" for axis in AXES)
        hint = f"; on CPU, JAX_NUM_CPU_DEVICES={needed} emulates them" if devices[0].platform == "cpu" else ""
        raise UserError(f"{shown} needs {needed} devices and there are {len(devices)}: make the mesh smaller{hint}")
    types = (jax.sharding.AxisType.Auto,) * len(AXES)
    return jax.make_mesh(shape, AXES, devices=devices[:needed], axis_types=types)


def check_divides(sizes: Mapping[str, int], quantities: Iterable[tuple[str, str, int]]) -> None:
    """Check that what is sharded divides evenly.

    Args:
        sizes: of the mesh's axes.
        quantities: (mesh axis, name of the quantity as the user knows it, count) of each.

    Raises:
        UserError: naming the axis, the number and the nearest sizes that work.
    """
    for axis, name, count in quantities:
        size = sizes[axis]
        if count % size:
            working = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
            below = max(divisor for divisor in working if divisor < size)
            above = [divisor for divisor in working if divisor > size][:1]
            nearest = " or ".join(str(divisor) for divisor in [below, *above])
            raise UserError(f"mesh.{axis}={size} does not divide {name} ({count}): {nearest} would")


def place(mesh: jax.sharding.Mesh, batch: Mapping[str, np.ndarray], microbatches: int) -> dict[str, Any]:
    """Cut a host batch of [B, ...] arrays into [M, B/M, ...] and put it on the mesh, rows over `data`."""
    placed = {}
    for name, array in batch.items():
        parts = array.reshape(microbatches, -1, *array.shape[1:])  # [M, B/M, ...]
        placed[name] = jax.device_put(parts, jax.NamedSharding(mesh, partition.batch_spec(parts.ndim)))
    return placed
