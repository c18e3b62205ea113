"""The mesh: axes `data`, `pipeline` and `tensor` over the devices of one process or many, and batches placed on it."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Protocol

import jax
import numpy as np
from jax import lax
from jax.experimental import mesh_utils

from glm_jax.errors import UserError
from glm_jax.parallel import partition
from glm_jax.parallel.jax_internals import varying_axes
from glm_jax.types import Tree

AXES = ("data", "pipeline", "tensor")
REST = -1  # the size of at most one axis: as many devices as the others leave


class Device(Protocol):
    """What a mesh needs to know of a device. jax has no type for its own devices."""

    @property
    def platform(self) -> str:
        """`cpu`, `gpu` or `tpu`."""
        ...

    @property
    def process_index(self) -> int:
        """The process that the device belongs to."""
        ...


def resolve(sizes: Mapping[str, int], devices: int) -> dict[str, int]:
    """Fill in the axis of size `REST`.

    Raises:
        UserError: there are two such axes, a size is below 1, or the other axes do not divide the devices.
    """
    named = {axis: sizes[axis] for axis in AXES}
    wild = [axis for axis, size in named.items() if size == REST]
    for axis, size in named.items():
        if size < 1 and size != REST:
            raise UserError(f"mesh.{axis} is {size}, it must be at least 1, or {REST} for the rest of the devices")
    if len(wild) > 1:
        raise UserError(f"mesh.{wild[0]} and mesh.{wild[1]} are both {REST}: only one axis can take the rest")
    if wild:
        others = math.prod(size for size in named.values() if size != REST)
        if devices % others:
            nearest = max(divisor for divisor in range(1, others) if devices % divisor == 0)
            raise UserError(
                f"mesh.{wild[0]}={REST} needs the other axes ({_shown(named, wild)}, {others} devices) to divide "
                f"{devices} devices: {nearest} would"
            )
        named[wild[0]] = devices // others
    return named


def _shown(sizes: Mapping[str, int], without: Iterable[str] = ()) -> str:
    return " x ".join(f"mesh.{axis}={size}" for axis, size in sizes.items() if axis not in without)


def build(sizes: Mapping[str, int], devices: Sequence[Device] | None = None) -> jax.sharding.Mesh:
    """Build the mesh; a laptop is 1 x 1 x 1. Members of `tensor`, which communicate most, are neighbours.

    Args:
        sizes: the size of each of `AXES`; one of them may be `REST`.
        devices: the mesh takes the first ones; by default every device of every process.

    Raises:
        UserError: there are fewer devices than the sizes need, or more in a run of several processes.
    """
    devices = list(jax.devices() if devices is None else devices)
    sizes = resolve(sizes, len(devices))
    shape = tuple(sizes[axis] for axis in AXES)
    needed = math.prod(shape)
    if needed > len(devices):
        hint = f"; on CPU, JAX_NUM_CPU_DEVICES={needed} emulates them" if devices[0].platform == "cpu" else ""
        raise UserError(
            f"{_shown(sizes)} needs {needed} devices and there are {len(devices)}: make the mesh smaller{hint}"
        )
    if needed < len(devices) and len({device.process_index for device in devices}) > 1:
        raise UserError(
            f"{_shown(sizes)} uses {needed} of the {len(devices)} devices of several processes: it must use all of "
            f"them, as mesh.data={REST} does"
        )
    grid = mesh_utils.create_device_mesh(shape, devices[:needed], allow_split_physical_axes=True)
    return jax.sharding.Mesh(grid, AXES, axis_types=(jax.sharding.AxisType.Auto,) * len(AXES))


def check_divides(sizes: Mapping[str, int], quantities: Iterable[tuple[str, str, int]]) -> None:
    """Check that sharded quantities divide evenly.

    Args:
        sizes: of the mesh's axes.
        quantities: mesh axis, the user's name for the quantity, and count of each.

    Raises:
        UserError: naming the axis, the number and the nearest sizes that work.
    """
    for axis, name, count in quantities:
        size = sizes[axis]
        if count % size:
            raise UserError(f"mesh.{axis}={size} does not divide {name} ({count}): {nearest(size, count)} would")


def nearest(size: int, count: int) -> str:
    """Return the divisors of `count` nearest to `size`, which is not one, as text."""
    working = [divisor for divisor in range(1, count + 1) if count % divisor == 0]
    below = max(divisor for divisor in working if divisor < size)
    above = [divisor for divisor in working if divisor > size][:1]
    return " or ".join(str(divisor) for divisor in [below, *above])


def local_members(mesh: jax.sharding.Mesh) -> list[int]:
    """Return which members of the axis `data` have a device in this process."""
    here = {place[0] for place, device in np.ndenumerate(mesh.devices) if device.process_index == jax.process_index()}
    return sorted(here)


def local_rows(mesh: jax.sharding.Mesh, global_batch: int, microbatches: int) -> np.ndarray:
    """Return which rows of the global batch this process must read: int [M, B/M of this process].

    Each microbatch is split evenly over `data`; the stages and tensor members of a data member read the same rows.
    """
    rows = np.arange(global_batch).reshape(microbatches, mesh.shape["data"], -1)  # [M, data, B/M/data]
    return rows[:, local_members(mesh)].reshape(microbatches, -1)


def place(mesh: jax.sharding.Mesh, batch: Tree, microbatches: int) -> Tree:
    """Put a host batch on the mesh as arrays [M, B/M, ...], with the rows split over `data`.

    Args:
        mesh: of any number of processes.
        batch: a tree of arrays [B of this process, ...], the rows of `local_rows` in order.
        microbatches: M.
    """
    members = local_members(mesh)

    def placed(array: np.ndarray) -> jax.Array:
        parts = array.reshape(microbatches, len(members), -1, *array.shape[1:])  # [M, members, B/M/data, ...]
        share = parts.shape[2]

        def read(index: tuple[slice, ...] | None) -> np.ndarray:
            assert index is not None  # as it would be for a scalar
            start, stop, _ = index[1].indices(share * mesh.shape["data"])
            chosen = [members.index(member) for member in range(start // share, stop // share)]
            return parts[:, chosen].reshape(microbatches, -1, *parts.shape[3:])  # [M, rows of these members, ...]

        shape = (microbatches, share * mesh.shape["data"], *array.shape[1:])
        sharding = jax.NamedSharding(mesh, partition.batch_spec(len(shape)))
        return jax.make_array_from_callback(shape, sharding, read)

    return jax.tree.map(placed, batch)


def vary(tree: Tree, axes: tuple[str, ...] | frozenset[str] = AXES) -> Tree:
    """Mark arrays as differing along `axes`, so that JAX inserts no reduction before the caller's own."""

    def mark(x: jax.Array) -> jax.Array:
        missing = tuple(axis for axis in axes if axis not in varying_axes(x))
        return lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(mark, tree)
