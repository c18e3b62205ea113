"""Compare the estimated memory of a training step with the compiled one on many meshes, schedules and stashes.

    python tests/proofs/plan_grid.py [--seed 0 --count 20]

Several meshes of up to eight emulated CPU devices with every schedule, stash and zero stage, then `count` experiments
drawn at random, among them such as nobody would train: 32 wide, 16 rows in the only microbatch. Prints a line for each,
with the estimate as a share of the compiled peak. Fails if more than one in twenty of the former is off by more than a
tenth; the latter show where the estimate is too low. In float32, because XLA for CPUs computes half precision so.
"""

from __future__ import annotations

import argparse
import itertools
import os
import random
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
os.environ |= {"JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"

from glm_jax.errors import UserError  # noqa: E402 (needs the path, and reads the environment)
from tests.planning.peaks import peaks  # noqa: E402

MESHES = [(1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 2), (1, 4, 2), (4, 2, 1), (1, 1, 4)]
STASHES = ("layer", "stage", "products", "all")
OFF = 0.1


def grid() -> list[dict[str, Any]]:
    """Return the sets of changes in order."""
    found = []
    for (data, stages, tensor), schedule, stash in itertools.product(MESHES, ("1f1b", "gpipe"), STASHES):
        if stages > 1 or schedule == "1f1b":  # one stage has one schedule
            mesh = {"mesh.data": data, "mesh.pipeline": stages, "mesh.tensor": tensor}
            found.append(mesh | {"pipeline.schedule": schedule, "pipeline.stash": stash})
    split = [{"mesh.zero": 3, "mesh.data": data, "mesh.tensor": tensor} for data, tensor in ((2, 1), (4, 2), (2, 4))]
    adapters = {"train.init_from": "elsewhere", "train.lora.rank": 4, "mesh.data": 2, "mesh.pipeline": 2}
    return [*found, *split, adapters]


def drawn(generator: random.Random) -> dict[str, Any]:
    """Draw a set of changes; not all of them fit."""
    heads, width = generator.choice([2, 4, 8]), generator.choice([16, 32, 64])
    mesh = generator.choice(MESHES)
    return dict(zip(("mesh.data", "mesh.pipeline", "mesh.tensor"), mesh, strict=True)) | {
        "model.num_heads": heads,
        "model.hidden_size": heads * width,
        "model.ffn_size": heads * width * generator.choice([2, 3, 4]),
        "model.num_layers": generator.randint(4, 9),
        "model.vocab_size": generator.choice([1024, 4096, 16384]),
        "model.norm": generator.choice(["deepnorm", "post", "pre", "sandwich"]),
        "model.position": generator.choice(["rope", "alibi", "learned_2d"]),
        "model.activation": generator.choice(["geglu", "gelu", "gelu_tanh"]),
        "model.hidden_dropout": generator.choice([0.0, 0.1]),
        "model.attention_dropout": generator.choice([0.0, 0.1]),
        "data.seq_length": generator.choice([64, 128, 256, 512]),
        "train.microbatches": generator.choice([1, 2, 4]),
        "pipeline.schedule": generator.choice(["1f1b", "gpipe"]),
        "pipeline.stash": generator.choice(STASHES),
    }


def main() -> int:
    """Compare both; return 1 if the grid is off."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--count", type=int, default=20)
    options = parser.parse_args()
    generator = random.Random(options.seed)
    off = compare("grid", grid())
    if options.count:
        compare("drawn", [drawn(generator) for _ in range(options.count)])
    return int(off > 0.05)


def compare(name: str, changes: list[dict[str, Any]]) -> float:
    """Print each comparison and a line on all of them; return the share that is off by more than `OFF`."""
    shares = []
    for one in changes:
        try:
            estimated, compiled = peaks(one)
        except UserError as error:
            print(f"does not fit: {error}")
            continue
        shares.append(estimated / compiled)
        print(f"{shares[-1]:.3f} of {compiled / 1e6:8.2f} MB {one}", flush=True)
    off = sum(abs(share - 1) > OFF for share in shares)
    mean = sum(shares) / len(shares)
    print(
        f"{name}: n = {len(shares)}, {min(shares):.3f} to {max(shares):.3f}, mean {mean:.3f}; {off} off by over {OFF}"
    )
    return off / len(shares)


if __name__ == "__main__":
    sys.exit(main())
