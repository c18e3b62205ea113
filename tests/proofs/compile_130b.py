"""Compile one whole train_step of experiments/glm_130b.py, from shapes alone, and report the memory of a device.

    python tests/proofs/compile_130b.py [--target cpu|a100|v5p] [--bound 38] [--microbatches 176] [--stash layer]
    python tests/proofs/compile_130b.py --program save|restore

The second compiles what a state goes through on its way to the disk or back: the 72 layers of its stages become the
70 true ones.

24 x 8 x 4 devices (data, pipeline, tensor), microbatches of one row of 2,048 tokens, 70 layers over 8 stages, float16
weights, float32 sums, dropout, packed segments, loss scale. Nothing runs: the 768 devices exist in name only. The
A100-40GB target needs XLA's CUDA compiler (jax-cuda12-plugin, jax-cuda12-pjrt and the nvidia wheels they require), the
TPU v5p target needs libtpu; neither needs the hardware. The bound for the CPU is higher than for a GPU, because XLA
fuses less for CPUs.
"""

from __future__ import annotations

import argparse
import math
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))
os.environ |= {"JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "768", "TPU_SKIP_MDS_QUERY": "1"}

from glm_jax.data.rows.rows import Rows  # noqa: E402
from tests.parallel import hlo  # noqa: E402 (needs the path, and reads the environment)
from tests.proofs import targets  # noqa: E402

SHAPE = (24, 8, 4)  # data, pipeline, tensor
TOPOLOGIES = {"v5p": "v5p:8x8x12"}
NUM_TOKENS = 150_344  # pieces of the official tokenizer
BOUNDS = {"cpu": 38.0, "a100": 31.75, "v5p": 33.0}  # GB; XLA's pool on an A100-40GB is 31.75 GB by default


def arguments() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--target", choices=BOUNDS, default="cpu")
    parser.add_argument("--program", choices=("step", "save", "restore"), default="step")
    parser.add_argument("--bound", type=float, help="fail above this many GB (1e9 bytes) a device")
    parser.add_argument("--microbatches", type=int, default=176)
    parser.add_argument("--schedule", default="1f1b")
    parser.add_argument("--stash", default="layer")
    parser.add_argument("--precision", default="float16")
    return parser.parse_args()


def lower(options: argparse.Namespace) -> Any:
    """Lower the program of the experiment, with the changes on the command line."""
    import jax
    from jax.typing import DTypeLike

    from glm_jax.config import resolve
    from glm_jax.engine import build
    from glm_jax.parallel import partition
    from glm_jax.training import step, stretch
    from glm_jax.training.state import disk_targets, from_disk, init_state, state_specs, to_disk
    from glm_jax.types import Tree

    config = experiment(options)
    config = resolve(config)
    length = config.data.seq_length
    target: str = options.target
    target = TOPOLOGIES.get(target, target)
    engine, grid = build(config, NUM_TOKENS, targets.devices(target, math.prod(SHAPE)))
    cfg = stretch.step_config(config, engine)

    def describe(shape: tuple[int, ...], dtype: DTypeLike, sharding: jax.sharding.Sharding) -> Tree:
        return jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)

    shapes = jax.eval_shape(lambda: init_state(cfg, grid.shape["pipeline"]))
    shardings = partition.shardings(grid, state_specs(cfg, grid))
    state = jax.tree.map(lambda leaf, place: describe(leaf.shape, leaf.dtype, place), shapes, shardings)
    if options.program == "save":
        return jax.jit(lambda state: to_disk(cfg, grid, state)).lower(state)
    if options.program == "restore":
        return jax.jit(lambda items: from_disk(cfg, grid, items)).lower(disk_targets(cfg, grid))
    rows = (options.microbatches, config.train.global_batch // options.microbatches)
    batch = jax.tree.map(
        lambda array: describe(array.shape, array.dtype, jax.NamedSharding(grid, partition.batch_spec(array.ndim))),
        Rows.abstract((*rows, length)),
    )
    train, _ = step.compile_steps(cfg, grid)
    requests = describe((grid.size,), "i4", jax.NamedSharding(grid, jax.P(grid.axis_names)))
    scalar = describe((), "f4", jax.NamedSharding(grid, jax.P()))
    return train.lower(state, batch, step.Controls(scalar, scalar, requests), ())


def experiment(options: argparse.Namespace) -> Any:
    """Return the experiment's config with the changes on the command line; microbatches keep their size."""
    config = targets.glm_130b()
    config.train.global_batch = config.train.global_batch // config.train.microbatches * options.microbatches
    config.train.microbatches = options.microbatches
    config.train.precision = options.precision
    config.pipeline.schedule, config.pipeline.stash = options.schedule, options.stash
    return config


def report(options: argparse.Namespace, compiled: Any, lowering: float, compiling: float) -> tuple[float, bool]:
    """Print the results; return the peak in GB, and whether a collective runs over `data` in the tick loop."""
    memory = compiled.memory_analysis()
    peak = targets.peak_bytes(options.target, memory)
    resident = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # Linux gives kB
    found = hlo.collectives(compiled.as_text() or "", SHAPE)
    what = f"{options.schedule}, stash {options.stash}, {options.precision}, {options.microbatches} microbatches"
    print(f"{options.target}: {what if options.program == 'step' else options.program}; compiled from shapes, not run")
    print(f"peak {peak / 1e9:.2f} GB a device: arguments {memory.argument_size_in_bytes / 1e9:.2f}, "
          f"temporaries {memory.temp_size_in_bytes / 1e9:.2f}")  # fmt: skip
    print(f"collectives by axes, in the tick loop {found['inside']}, outside {found['outside']}")
    print(f"lowered in {lowering:.1f} s, compiled in {compiling:.1f} s, {resident:.2f} GB resident")
    return peak / 1e9, any("data" in axes for axes in found["inside"])


def main() -> int:
    """Lower, compile, report; return 1 if the step is over the bound or reduces over `data` in the tick loop."""
    options = arguments()
    began = time.monotonic()
    lowered = lower(options)
    lowered_at = time.monotonic()
    compiled = lowered.compile()
    peak, talks = report(options, compiled, lowered_at - began, time.monotonic() - lowered_at)
    bound = options.bound or BOUNDS[options.target]
    if peak > bound:
        print(f"that is over the bound of {bound} GB")
    return int(peak > bound or talks)


if __name__ == "__main__":
    sys.exit(main())
