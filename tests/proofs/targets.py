"""Accelerators that need not be present: their descriptions, as the proofs compile for them, and GLM-130B's config."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[2]


class Card(NamedTuple):
    """A GPU, as its vendor's data sheet has it. Clock and bandwidth guide XLA's choices, nothing is run."""

    name: str
    memory: int  # bytes
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    fpus: int  # float32 units a core
    threads: int  # a core, at most
    shared_memory: int  # bytes a core
    bandwidth: int  # bytes a second
    cache: int  # bytes, L2
    clock: float  # GHz

    def describe(self) -> str:
        """Return the description that XLA takes of a GPU that is not present, a GpuTargetConfigProto as text."""
        return f"""
gpu_device_info {{
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152
  shared_memory_per_core: {self.shared_memory} shared_memory_per_block_optin: {self.shared_memory - 1024}
  threads_per_core_limit: {self.threads} core_count: {self.cores} fpus_per_core: {self.fpus}
  block_dim_limit_x: 2147483647 block_dim_limit_y: 65535 block_dim_limit_z: 65535
  memory_bandwidth: {self.bandwidth} l2_cache_size: {self.cache} clock_rate_ghz: {self.clock}
  device_memory_size: {self.memory}
  cuda_compute_capability {{ major: {self.capability[0]} minor: {self.capability[1]} }}
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}}
platform_name: "CUDA" dnn_version_info {{ major: 9 minor: 8 }} runtime_version {{ major: 12 minor: 8 }}
device_description_str: "{self.name}"
"""


A100 = Card(
    "NVIDIA A100-SXM4-40GB", 42331013120, (8, 0), cores=108, fpus=64, threads=2048, shared_memory=167936,
    bandwidth=1555000000000, cache=41943040, clock=1.41,
)  # fmt: skip
# its memory: 24 GiB less what a driver keeps, which is an assumption
RTX3090 = Card(
    "NVIDIA GeForce RTX 3090", 25438126080, (8, 6), cores=82, fpus=128, threads=1536, shared_memory=102400,
    bandwidth=936000000000, cache=6291456, clock=1.695,
)  # fmt: skip
CARDS = {"a100": A100, "rtx3090": RTX3090}
POOL = 0.75  # of a GPU's memory, which XLA takes for arrays by default


def devices(target: str, count: int) -> Any:
    """Return descriptions of at least `count` devices: of this process's CPU, of a GPU in CARDS, of a TPU.

    A TPU is named with its topology, such as `v5e:4x4`.
    """
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()
    if target in CARDS:
        config = CARDS[target].describe()
        return topologies.get_topology_desc("t", platform="cuda", topology=f"{-(-count // 8)}x{min(count, 8)}x1",
                                            target_config=config).devices  # fmt: skip
    return topologies.get_topology_desc(target, platform="tpu").devices


def glm_130b() -> Any:
    """Return the config of experiments/glm_130b.py, unresolved."""
    spec = importlib.util.spec_from_file_location("glm_130b", ROOT / "experiments" / "glm_130b.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()


def peak_bytes(target: str, memory: Any) -> int:
    """Return the peak bytes of a device that XLA's memory analysis of a compiled program says."""
    whole = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    # The peak that XLA reports for the CPU leaves temporaries out.
    return whole + memory.temp_size_in_bytes if target == "cpu" else memory.peak_memory_in_bytes
