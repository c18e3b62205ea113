"""Compiles one whole optimizer step of GLM-130B, from shapes alone, and says what a device holds.

    python tests/proofs/compile_130b.py [--target cpu] [--microbatches 176] [--stash layer] [--bound 45]

24 x 8 x 4 devices (data, pipeline, tensor), microbatches of one row of 2,048 tokens, 70 layers over 8 stages, float16
weights, float32 sums, dropout, packed segments, embedding gradient shrink and loss scale. Nothing is run: no device
holds anything, and the emulated devices exist in name only.
"""

from __future__ import annotations

import argparse
import dataclasses
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

SIZES = {"data": 24, "pipeline": 8, "tensor": 4}
LENGTH = 2048

# NVIDIA A100-SXM4-40GB, as XLA wants a GPU described that is not there.
A100 = """
gpu_device_info {
  threads_per_block_limit: 1024 threads_per_warp: 32 shared_memory_per_block: 49152 shared_memory_per_core: 167936
  threads_per_core_limit: 2048 core_count: 108 fpus_per_core: 64 block_dim_limit_x: 2147483647 block_dim_limit_y: 65535
  block_dim_limit_z: 65535 memory_bandwidth: 1555000000000 l2_cache_size: 41943040 clock_rate_ghz: 1.41
  device_memory_size: 42331013120 shared_memory_per_block_optin: 166912
  cuda_compute_capability { major: 8 minor: 0 }
  registers_per_core_limit: 65536 registers_per_block_limit: 65536
}
platform_name: "CUDA" dnn_version_info { major: 9 minor: 8 } runtime_version { major: 12 minor: 8 }
device_description_str: "NVIDIA A100-SXM4-40GB"
"""


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=("cpu", "a100", "v5p"), default="cpu")
    parser.add_argument("--microbatches", type=int, default=176)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--stash", default="layer")
    parser.add_argument("--compute", default="float16")
    parser.add_argument("--bound", type=float, default=45.0, help="fail above so many GB (1e9 bytes) a device")
    parser.add_argument("--hlo", default="", help="write the compiled program here")
    return parser.parse_args()


def devices(target: str) -> Any:
    """Give 768 devices that are only described."""
    import jax
    from jax.experimental import topologies

    if target == "cpu":
        return jax.devices()
    if target == "v5p":
        return topologies.get_topology_desc("v5p:8x8x12", platform="tpu").devices
    return topologies.get_topology_desc("t", platform="cuda", topology="96x8x1", target_config=A100).devices


def main() -> int:
    """Lower, compile, report; exit code 1 when the step is over the bound."""
    options = arguments()
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["TPU_SKIP_MDS_QUERY"] = "1"
    os.environ["JAX_NUM_CPU_DEVICES"] = "768"
    sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
    import jax

    from tests.proofs import glm_130b

    grid = glm_130b.build_mesh(SIZES, devices(options.target))
    cfg = dataclasses.replace(glm_130b.CONFIG, schedule=options.schedule, keep=options.stash, compute=options.compute)
    began = time.monotonic()
    lowered = glm_130b.lower(cfg, grid, options.microbatches, LENGTH)
    lowered_at = time.monotonic()
    compiled = lowered.compile()
    compiled_at = time.monotonic()
    memory = compiled.memory_analysis()
    held = memory.argument_size_in_bytes + memory.output_size_in_bytes - memory.alias_size_in_bytes
    peak = held + memory.temp_size_in_bytes if options.target == "cpu" else memory.peak_memory_in_bytes
    if options.hlo:
        Path(options.hlo).write_text(compiled.as_text())
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux gives kB
    print(f"target {options.target}, {options.schedule}, stash {options.stash}, {options.microbatches} microbatches")
    print(f"peak {peak / 1e9:.2f} GB a device, arguments {memory.argument_size_in_bytes / 1e9:.2f}, "
          f"temporary {memory.temp_size_in_bytes / 1e9:.2f}")  # fmt: skip
    print(f"lowered in {lowered_at - began:.1f} s, compiled in {compiled_at - lowered_at:.1f} s, "
          f"{resident:.2f} GB resident, jax {jax.__version__}")  # fmt: skip
    return 0 if peak / 1e9 <= options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
