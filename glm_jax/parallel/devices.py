"""The devices of this process: what they are, their peak rate, and the memory in use."""

from __future__ import annotations

import math
import os
import resource
import sys
import time
from pathlib import Path

import jax
import jax.numpy as jnp

from glm_jax.parallel import device_sheet


def facts() -> dict[str, str | int]:
    """Return what the log says of the devices: `platform` and the number of `devices` of all processes."""
    return {"platform": jax.default_backend(), "devices": jax.device_count()}


def describe() -> str:
    """Return one line about the devices in use, with a warning if jax leaves an NVIDIA GPU of this machine idle."""
    kind = jax.devices()[0].device_kind
    line = f"devices: {jax.device_count()} x {kind} ({jax.default_backend()}), jax {jax.__version__}"
    if jax.default_backend() == "cpu" and Path("/dev/nvidiactl").exists():
        line += "; an NVIDIA GPU is here, but this jax uses the CPU: pip install -e '.[cuda]'"
    return line


def matmul_rate(size: int = 1024, repeats: int = 8) -> float:
    """Measure the float32 matmul rate of this process's device, in FLOP/s: the best of `repeats`."""
    multiply = jax.jit(jnp.matmul)
    matrix = jnp.ones((size, size))
    multiply(matrix, matrix).block_until_ready()
    best = math.inf
    for _ in range(repeats):
        start = time.perf_counter()
        multiply(matrix, matrix).block_until_ready()
        best = min(best, time.perf_counter() - start)
    return 2 * size**3 / best


def peak_flops(mesh: jax.sharding.Mesh) -> float:
    """Return the peak FLOP/s of the whole mesh: from the sheet of devices, or measured now if the device is not in it.

    Emulated devices share one CPU, so the measured rate counts once there.
    """
    device = mesh.devices.flat[0]
    known = device_sheet.of_kind(device.device_kind)
    if known:
        return known.peak * mesh.size
    return matmul_rate() * (1 if device.platform == "cpu" else mesh.size)


def peak_memory() -> int:
    """Return the peak memory in bytes: of the fullest of this process's accelerators, or of the process.

    Accelerators report their own memory; on CPU it is the resident memory of the process.
    """
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        unit = 1 if sys.platform == "darwin" else 1024
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return max((device.memory_stats() or {}).get("peak_bytes_in_use", 0) for device in devices)


def device_memory() -> int:
    """Return the bytes of memory of a device: an accelerator's own, or an even share of the machine's."""
    devices = jax.local_devices()
    if devices[0].platform == "cpu":
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") // len(devices)
    return (devices[0].memory_stats() or {})["bytes_limit"]
