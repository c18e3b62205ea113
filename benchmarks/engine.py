"""Time a training step by schedule and stash, on one device and on a mesh of emulated devices.

    python benchmarks/engine.py [--rounds 7] [--against CHECKOUT] [--mesh 2,2,2] [--choices layer:1f1b,all:1f1b] ...

Each side is train.py's, with the same global batch; a microbatch has as many rows on each device of the mesh as on the
one device, which therefore takes more microbatches. The emulated devices share the cores, so CPU seconds tell what the
mesh costs: what devices compute twice, copy and send. The lines are medians with the smallest and the largest round.
"""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import rounds
import shared
from rounds import Side, compare, interval

CHOICES = "layer:1f1b,layer:gpipe,stage:1f1b,all:1f1b"
SIZES = {"layers": 8, "hidden": 256, "heads": 8, "ffn": 688, "vocabulary": 2048}
AGAINST = ", the other commit"


def sides(options: argparse.Namespace) -> tuple[list[Side], list[tuple[str, str]]]:
    """Return what takes turns, and the names of the pairs to compare."""
    sizes = map(int, options.mesh.split(","))
    data, devices = next(sizes), math.prod(map(int, options.mesh.split(",")))
    words = [word for flag in (*SIZES, "rows", "length") for word in (f"--{flag}", str(getattr(options, flag)))]
    held, pairs = [], []
    for choice in options.choices.split(","):
        stash, schedule = choice.split(":")
        names = [f"{place}, {stash}, {schedule}" for place in ("one device", options.mesh)]
        pairs.append((names[1], names[0]))
        for name, mesh, microbatches in zip(
            names, ("1,1,1", options.mesh), (options.microbatches * data, options.microbatches), strict=True
        ):
            chosen = ["--stash", stash, "--schedule", schedule, "--mesh", mesh, "--microbatches", str(microbatches)]
            for suffix, tree in (("", rounds.TREE), (AGAINST, options.against)):
                if tree:
                    held.append(rounds.script(
                        name + suffix, str(Path(__file__).with_name("train.py")), *words, *chosen, "--side", "ours",
                        tree=tree, environment={"JAX_NUM_CPU_DEVICES": str(devices)},
                    ))  # fmt: skip
            if options.against:
                pairs.append((name + AGAINST, name))
    return held, pairs


def main(words: Sequence[str]) -> None:
    """Run the benchmark."""
    parser = shared.parser(__doc__, {**SIZES, "rows": 16, "length": 128, "microbatches": 4})
    parser.add_argument("--mesh", default="2,2,2", help="devices on the axes data, pipeline and tensor")
    parser.add_argument("--choices", default=CHOICES, help="stash:schedule, ...")
    shared.add_against(parser)
    options = parser.parse_args(words)
    held, pairs = sides(options)
    measured = rounds.measure(held, options.rounds)
    for name, side in measured.items():
        print(f"{name}: {interval(side.seconds())} s a step, {interval(side.cpu_seconds())} CPU s; "
              f"loss {side.turns[-1].parts['loss']:.4f}")  # fmt: skip
    for above, below in pairs:
        print(compare(measured, above, below))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
