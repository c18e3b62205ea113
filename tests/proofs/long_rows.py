"""Train a small model on rows of 8,192 tokens on a CPU, and say how much memory it takes.

    python tests/proofs/long_rows.py [--length 8192] [--attention blockwise|reference] [--steps 3] [--bound 2]

Two layers of 256 with 4 heads and a vocabulary of 8,192, float32, one row a step, full of packed samples of 32 to
half as many tokens as the row has. The steps are those of a run: the pipeline, AdamW, a finite check. The loss must
fall, and the resident memory of the process must stay below the bound.
"""

from __future__ import annotations

import argparse
import os
import resource
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

from glm_jax.data.rows.rows import Rows  # noqa: E402 (needs the path)

VOCABULARY, LR = 8192, 1e-3


def packed(length: int) -> Rows[np.ndarray]:
    """Return one row [1, S] of packed samples, of which 10% to 90% are context."""
    random = np.random.default_rng(0)
    rows = Rows.empty(1, length, pad=0)
    rows.tokens[:] = random.integers(2, VOCABULARY, rows.tokens.shape)
    rows.targets[:] = random.integers(2, VOCABULARY, rows.tokens.shape)
    start, segment = 0, 1
    while start < length:
        size = min(int(random.integers(32, length // 2 + 1)), length - start)
        divide, stop = start + int(size * random.uniform(0.1, 0.9)), start + size
        rows.positions[0, start:stop] = np.arange(size)
        rows.segments[0, start:stop] = segment
        rows.context[0, start:divide] = True
        rows.loss_mask[0, divide:stop] = 1
        start, segment = stop, segment + 1
    return rows


def main() -> int:
    """Take the steps; return 0 if they were as they must be."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--length", type=int, default=8192)
    parser.add_argument("--attention", choices=("blockwise", "reference"), default="blockwise")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--bound", type=float, default=2.0, help="GB (1e9 bytes)")
    options = parser.parse_args()

    from glm_jax.config.data import OBJECTIVES
    from glm_jax.config.training import OptimizerConfig
    from glm_jax.engine import EngineConfig
    from glm_jax.model import GLMConfig
    from glm_jax.parallel import mesh as meshes
    from glm_jax.training import step
    from glm_jax.training.state import StepConfig, create_state

    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    glm = GLMConfig(2, 256, 4, 688, VOCABULARY, max_length=options.length)
    engine = EngineConfig(glm, VOCABULARY, len(OBJECTIVES), attention=options.attention)
    cfg = StepConfig(engine, OptimizerConfig(), None, seed=0)
    state, train = create_state(cfg, mesh), step.compile_steps(cfg, mesh)[0]
    rows, losses = meshes.place(mesh, packed(options.length), 1), list[float]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    for _ in range(options.steps):
        start = time.perf_counter()
        metrics: Any
        state, metrics = train(state, rows, step.controls(mesh, LR, 1.0), ())
        losses.append(float(metrics["sums"].loss.sum() / metrics["sums"].targets.sum()))
        print(f"loss {losses[-1]:.4f}, {time.perf_counter() - start:.1f} s")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    scores = 4 * glm.num_heads * options.length**2 / 1e9
    print(f"{options.attention}, rows of {options.length}: {peak:.2f} GB resident at most, {before:.2f} before")
    print(f"the first step; scores of all pairs in one layer would be {scores:.2f} GB")
    return 0 if losses[-1] < losses[0] and peak < options.bound else 1


if __name__ == "__main__":
    sys.exit(main())
