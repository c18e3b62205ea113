"""Time attention on a CPU, forward and backward: block by block, dense, and another commit's dense core.

    python benchmarks/attention.py [--rounds 7] [--length 512] [--rows 4] [--heads 8] [--dim 64] [--against CHECKOUT]

The rows are full of packed samples of 32 to half as many tokens as a row has. The lines are medians with the smallest
and the largest round, and the temporary bytes of the compiled programs.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import rounds
from rounds import Measured, Side, interval, ratios

OURS, DENSE, AGAINST = "blockwise", "reference", "reference of the other commit"


def packed(rows: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the segments and the context of packed rows, [B, S] each."""
    random = np.random.default_rng(0)
    segments, context = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    for row in range(rows):
        start = 0
        while start < length:
            size = min(int(random.integers(32, length // 2 + 1)), length - start)
            segments[row, start : start + size] = segments[row].max() + 1
            context[row, start : start + int(size * random.uniform(0.1, 0.9))] = True
            start += size
    return segments, context


def serve(options: argparse.Namespace) -> None:
    """Be one side, with the glm_jax that this process finds."""
    import jax
    import jax.numpy as jnp

    from glm_jax.model import GLMConfig, Visibility
    from glm_jax.model.attention_core import reference

    core = reference
    if options.side == OURS:
        from glm_jax.model.attention_blockwise import blockwise as core
    cfg = GLMConfig(1, options.heads * options.dim, options.heads, 8, 64)
    visibility = Visibility(*map(jnp.asarray, packed(options.rows, options.length)))
    by_head = (options.rows, options.heads, options.length, options.dim)
    by_token = (options.rows, options.length, options.heads, options.dim)
    keys = jax.random.split(jax.random.key(0), 4)
    arrays = [jax.random.normal(keys[i], shape) for i, shape in enumerate((by_token, by_head, by_head, by_token))]

    @jax.jit
    def both(queries: jax.Array, keys: jax.Array, values: jax.Array, gradient: jax.Array) -> object:
        def mix(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return core(cfg, queries, keys, values, visibility, None, jnp.int32(0), jnp.arange(options.heads), None)

        mixed, pull = jax.vjp(mix, queries, keys, values)
        return mixed, pull(gradient)

    analysis = both.lower(*arrays).compile().memory_analysis()

    def turn() -> dict[str, float]:
        jax.block_until_ready(both(*arrays))
        return {}

    rounds.serve(turn, lambda: {"temporaries": getattr(analysis, "temp_size_in_bytes", 0)})


def report(measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    base = measured[OURS]
    for name, side in measured.items():
        milliseconds = [1e3 * seconds for seconds in side.seconds()]
        print(f"{name}: {interval(milliseconds, 1)} ms, {side.about['temporaries'] / 1e6:.1f} MB of temporaries")
        if side is not base:
            print(f"{name} / {OURS}: {ratios(side.seconds(), base.seconds())} of the seconds, "
                  f"{ratios(side.cpu_seconds(), base.cpu_seconds())} of the CPU seconds")  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in {"rounds": 7, "rows": 4, "length": 512, "heads": 8, "dim": 64}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--side", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.side:
        return serve(options)
    tree = Path(__file__).resolve().parent.parent
    trees = {OURS: tree, DENSE: tree} | ({AGAINST: options.against.resolve()} if options.against else {})
    sides = [
        Side(name, [sys.executable, __file__, *words, "--side", name], {"PYTHONPATH": str(place)})
        for name, place in trees.items()
    ]
    return report(rounds.measure(sides, options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
