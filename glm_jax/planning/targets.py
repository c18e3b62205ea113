"""What programs are compiled for: emulated CPU devices, a GPU of the sheet, a slice of TPUs. None must be present."""

from __future__ import annotations

import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax.errors import UserError
from glm_jax.parallel import device_sheet
from glm_jax.parallel.device_sheet import Device, Gpu

if TYPE_CHECKING:
    from glm_jax.parallel import mesh as meshes

POOL = 0.75  # of a GPU's memory, which XLA takes for arrays by default
NODE = 8  # GPUs, where the sheet does not say it


@dataclass(frozen=True)
class Target:
    """A kind of device to compile for.

    Attributes:
        name: as the user writes it, such as `cpu`, `a100-40gb` or `v5p:8x8x12`.
        device: its entry in the sheet; None for the CPU.
        chips: the arrangement of a slice of TPUs, such as `8x8x12`.
    """

    name: str
    device: Device | None = None
    chips: str = ""

    @property
    def slice_devices(self) -> int | None:
        """The number of devices of a slice; None if the target is none."""
        return math.prod(map(int, self.chips.split("x"))) if self.chips else None

    @property
    def memory(self) -> int | None:
        """The bytes that programs and their arrays get: of a GPU, XLA's pool by default; None for the CPU."""
        if self.device is None:
            return None
        return int(POOL * self.device.memory) if self.device.gpu else self.device.memory


def find(name: str, *sheets: Path, compiled: bool = True) -> Target:
    """Return the target of that name.

    Args:
        name: `cpu`, a GPU of the sheet, or a kind of TPU of the sheet with its slice, such as `v5p:8x8x12`.
        sheets: files of devices beside our own.
        compiled: whether something is to be compiled for it; if not, any device of the sheet will do.

    Raises:
        UserError: there is no such device, nothing can be compiled for it, or the compiler is not installed.
    """
    if name == "cpu":
        return Target(name)
    kind, _, chips = name.partition(":")
    device = device_sheet.find(kind, *sheets)
    gpu = device.gpu is not None
    if gpu and chips:
        raise UserError(f"--target {name}: a GPU has no slice, write {kind}")
    if compiled and not gpu and device.topology is None:
        raise UserError(f"--target {name}: {kind} has neither gpu nor topology in its sheet, so nothing can be "
                        "compiled for it: add one (docs/planning.md)")  # fmt: skip
    if (chips or (compiled and not gpu)) and not re.fullmatch(r"[1-9]\d*(x[1-9]\d*)+", chips):
        raise UserError(f"--target {name}: TPUs are named with their slice, such as {kind}:2x2 or {kind}:2x2x1")
    if compiled and gpu:
        _need(name, ("jax_plugins.xla_cuda12", "jax_plugins.xla_cuda13"), "XLA's CUDA compiler", "cuda-aot")
    elif compiled:
        _need(name, ("libtpu",), "libtpu", "tpu-aot")
    return Target(name, device, chips)


def environment(target: Target, devices: int) -> dict[str, str]:
    """Return the environment of a process that compiles for so many devices; it must be set before jax is loaded."""
    flags = re.sub(r"--xla_force_host_platform_device_count=\S*", "", os.environ.get("XLA_FLAGS", ""))
    if target.device is None:  # of LLVM, after buffers are assigned: the program is slower, and compiled sooner
        flags += " --xla_backend_optimization_level=0"
    return {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(devices if target.device is None else 1),
        "JAX_ENABLE_COMPILATION_CACHE": "false",  # the report is of this compilation
        "TPU_SKIP_MDS_QUERY": "1",  # of no cloud machine
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "true",  # several processes may compile: none holds a chip
        "TF_CPP_MIN_LOG_LEVEL": "3",
        "XLA_FLAGS": flags.strip(),
    }


def devices(target: Target, count: int) -> Sequence[meshes.Device]:
    """Return at least `count` devices: those of this process's CPU, or descriptions. See `environment`.

    Raises:
        UserError: the compiler knows no such slice.
    """
    import jax
    from jax.experimental import topologies

    device = target.device
    if device is None:
        return jax.devices("cpu")
    if device.gpu is not None:
        node = min(count, device.node or NODE)
        return topologies.get_topology_desc(
            "described", platform="cuda", topology=f"{-(-count // node)}x{node}x1",
            target_config=describe(device, device.gpu),
        ).devices  # fmt: skip
    try:
        return topologies.get_topology_desc(f"{device.topology}:{target.chips}", platform="tpu").devices
    except (RuntimeError, ValueError, NotImplementedError) as error:  # the last: jax's answer to a platform it lacks
        raise UserError(f"--target {target.name}: libtpu refuses this slice ({str(error).splitlines()[0]})") from None


def describe(device: Device, gpu: Gpu) -> str:
    """Return the description that XLA takes of a GPU that is not present, a GpuTargetConfigProto as text."""
    return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {gpu.shared} shared_memory_per_block_optin: {gpu.shared - 1024}
  threads_per_core_limit: {gpu.threads} core_count: {gpu.cores} fpus_per_core: {gpu.units}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {int(device.bandwidth)} l2_cache_size: {int(gpu.cache)} clock_rate_ghz: {gpu.clock}
  device_memory_size: {device.memory}
  cuda_compute_capability {{ major: {gpu.capability[0]} minor: {gpu.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{gpu.name}"
"""


def memory(text: str) -> int:
    """Return the bytes of a text such as `40GB` (1e9 bytes each) or `32GiB`.

    Raises:
        UserError: it is not one.
    """
    units: Mapping[str, int] = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([MGT]i?B)", text)
    if not found or not float(found[1]):
        raise UserError(f"--memory {text}: write bytes a device with their unit, such as 40GB or 32GiB")
    return round(float(found[1]) * units[found[2]])


def _need(name: str, modules: Sequence[str], what: str, extra: str) -> None:
    """Raise UserError unless one of the modules is installed."""
    for module in modules:
        try:
            if importlib.util.find_spec(module):
                return
        except ModuleNotFoundError:  # of the package that holds it
            continue
    raise UserError(f"--target {name} needs {what}: pip install -e '.[{extra}]', or --nocompile for the estimate alone")
