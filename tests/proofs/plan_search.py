"""Compare estimated with compiled products, sent bytes and peak on ways that `glm-jax plan --search` ranks.

    python tests/proofs/plan_search.py [--devices 8 --count 12 --seed 0]

Draws ways to run a small experiment on emulated CPU devices, as many of one mesh as of another, compiles them, and
prints a line for each with the estimates as shares of what was compiled. Then it says for each quantity the smallest
and the largest share, and how many pairs of ways both sides order alike, with Kendall's tau. Fails if a share of
products or of sent bytes is off by more than a tenth, except for a pipeline of one microbatch, whose embedding XLA for
CPUs takes out of the loop over ticks. In float32, because XLA for CPUs computes half precision so.
"""

from __future__ import annotations

import argparse
import os
import random
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ["JAX_PLATFORMS"] = "cpu"

from glm_jax.config import resolve, with_changes  # noqa: E402 (needs the path, and reads the environment)
from glm_jax.planning import estimate, search, worker  # noqa: E402
from glm_jax.planning.comparison import Compared, Pair, ordered_alike  # noqa: E402
from glm_jax.planning.compile import Request, verdict  # noqa: E402
from glm_jax.planning.search import Choice, Way  # noqa: E402
from tests.planning.peaks import PIECES, SMALL  # noqa: E402

OFF = 0.1


def drawn(devices: int, count: int, generator: random.Random) -> list[Way]:
    """Return ways of which as many have one mesh as another."""
    found, _ = search.ways(resolve({}, SMALL), devices, PIECES)
    generator.shuffle(found)
    meshes: dict[tuple[int, int, int], list[Way]] = {}
    for way in found:
        meshes.setdefault((way.data, way.pipeline, way.tensor), []).append(way)
    turns = max(map(len, meshes.values()))
    return [ways[turn] for turn in range(turns) for ways in meshes.values() if turn < len(ways)][:count]


def main() -> int:
    """Compare; return 1 if products or sent bytes are off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--count", type=int, default=12)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    ways = drawn(options.devices, options.count, random.Random(options.seed))
    experiments = [with_changes(resolve({}, SMALL), way.changes()) for way in ways]
    pairs: dict[str, list[Pair]] = {}
    reports = worker.reports(map(Request, experiments))
    for way, experiment, report in zip(ways, experiments, reports, strict=True):
        choice = Choice(way, estimate.plan(experiment, estimate.PROCESSOR, PIECES))
        found = Compared(choice, report, verdict(report, 0)).pairs()
        for name, pair in found.items():
            pairs.setdefault(name, []).append(pair)
        print(", ".join(f"{name} {pair.ratio:.3f}" for name, pair in found.items()), f"of {way}", flush=True)
    judged = [number for number, way in enumerate(ways) if way.pipeline == 1 or way.microbatches > 1]
    off = False
    for name, several in pairs.items():
        shares = [pair.ratio for pair in several]
        alike, apart = ordered_alike(several)
        tau = (2 * alike - apart) / max(apart, 1)
        print(f"{name}: {min(shares):.3f} to {max(shares):.3f}, {alike} of {apart} pairs alike, tau {tau:.2f}")
        off |= name != "peak" and max(abs(shares[number] - 1) for number in judged) > OFF
    return int(off)


if __name__ == "__main__":
    sys.exit(main())
