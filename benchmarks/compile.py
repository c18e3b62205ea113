"""Time compiling a training step at several depths.

    python benchmarks/compile.py [--rounds 5] [--against CHECKOUT] [--depths 8 24 70] [--stash layer]

The model is small, as the time to compile hardly depends on its sizes. The lines are medians with the smallest and the
largest round. Compiled programs are not kept.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence

import rounds
import shared
import train
from rounds import Measured, clock, compare, interval, ratios

OURS, AGAINST = "ours", "the other commit"
SIZES = {"rows": 4, "microbatches": 2, "length": 128, "hidden": 128, "heads": 8, "ffn": 352, "vocabulary": 1024}


def serve(options: argparse.Namespace) -> None:
    """Be a side, with the glm_jax that this process finds."""
    import jax

    words = [f"--{name}={size}" for name, size in SIZES.items()] + [f"--stash={options.stash}"]
    steps = {depth: train.build(train.arguments([*words, f"--layers={depth}"])) for depth in options.depths}

    def turn() -> Mapping[str, float]:
        parts: dict[str, float] = {}
        jax.clear_caches()
        for depth, (step, arguments) in steps.items():
            work = lambda step=step, arguments=arguments: step.lower(*arguments).compile()  # noqa: E731
            parts |= clock(f"{depth} layers", work)
        return parts

    rounds.serve(turn)


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> None:
    """Print a line for each depth of each side, and how compiling grows with depth."""
    low, high = (f"{depth} layers" for depth in (min(options.depths), max(options.depths)))
    for name, side in measured.items():
        for depth in options.depths:
            part = f"{depth} layers"
            print(f"{part}, {name}: {interval(side.seconds(part))} s, {interval(side.cpu_seconds(part))} CPU s")
            if name != OURS:
                print(compare(measured, name, OURS, part))
        print(f"{high} / {low}, {name}: {ratios(side.seconds(high), side.seconds(low))} of the seconds, "
              f"{ratios(side.cpu_seconds(high), side.cpu_seconds(low))} of the CPU seconds")  # fmt: skip


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    parser = shared.parser(__doc__, {})
    parser.add_argument("--depths", type=int, nargs="+", default=[8, 24, 70])
    parser.add_argument("--stash", default="layer")
    shared.add_against(parser)
    options = parser.parse_args(words)
    if options.side:
        return serve(options)
    trees = {OURS: rounds.TREE} | ({AGAINST: options.against} if options.against else {})
    kept = {"JAX_ENABLE_COMPILATION_CACHE": "0"}
    sides = [
        rounds.script(name, __file__, *words, "--side", name, tree=tree, environment=kept)
        for name, tree in trees.items()
    ]
    return report(options, rounds.measure(sides, options.rounds))


if __name__ == "__main__":
    main(sys.argv[1:])
