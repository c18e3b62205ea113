"""Show that conversion and loading stay under 2 GB of resident memory, whatever the model's size.

    python tests/proofs/convert_memory.py --directory /some/disk

makes up an official checkpoint with an embedding of 4.3 GB in float16 and, once converted, a stacked feed-forward array
of 8.6 GB. It converts the checkpoint to orbax and back with another number of ranks, each in its own process, and reads
the peak of the process's resident memory (VmHWM). It compares the result with the original, chunk by chunk. Then it
loads a smaller model onto four emulated devices. Needs 48 GB of disk and, for loading, 9 GB of memory; takes about ten
minutes.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from glm_jax.config.fields import to_dict
from glm_jax.interop import convert, sat
from glm_jax.interop.layout import axis_sizes, official_tensors, tile_shape, tiles
from glm_jax.interop.shards import RANK_FILE, open_parameters
from glm_jax.interop.torch_archive import TensorStream, write_archive
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig

LIMIT = 2e9
LARGE = GLMConfig(num_layers=32, hidden_size=2048, num_heads=16, ffn_size=16384, vocab_size=2**20)
MEDIUM = GLMConfig(num_layers=8, hidden_size=2048, num_heads=16, ffn_size=16384, vocab_size=2**18)
RANKS, OTHER_RANKS = 2, 4


def made_up(seed: int, shape: tuple[int, ...]) -> Iterator[np.ndarray]:
    """Yield the rows of a float16 matrix in chunks: one chunk of noise, shifted by a different number each time."""
    tile = tile_shape(shape, itemsize=2)
    noise = np.random.default_rng(seed).standard_normal(tile, np.float32)
    for place, region in enumerate(tiles(shape, tile)):
        size = tuple(part.stop - part.start for part in region)
        yield (noise[tuple(slice(extent) for extent in size)] + place % 61).astype(np.float16)


def make_checkpoint(root: Path, cfg: GLMConfig, ranks: int) -> None:
    """Write an official checkpoint of made-up float16 numbers."""
    (root / "1").mkdir(parents=True)
    (root / "latest").write_text("1")
    for rank in range(ranks):
        streams = {}
        for place, (name, rule, _) in enumerate(official_tensors(cfg)):
            shape = rule.torch_shape(axis_sizes(cfg), ranks)
            seed = place * ranks + (rank if rule.split else 0)
            streams[name] = TensorStream(shape, np.dtype(np.float16), made_up(seed, shape))
        write_archive(root / "1" / RANK_FILE.format(rank), "module", streams)


def peak_memory() -> int:
    """Return the peak of this process's resident memory, in bytes."""
    match = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert match
    return int(match[1]) * 1024


def child(task: str, directory: Path) -> None:
    """Do one task, and print the bytes of the arrays that it holds and its peak memory."""
    held = 0
    if task == "sat-to-orbax":
        weights = open_weights(directory / "official", to_dict(LARGE))
        convert.to_workdir(weights, directory / "orbax", convert.experiment(LARGE))
    elif task == "orbax-to-sat":
        convert.orbax_to_sat(open_weights(directory / "orbax"), directory / "back", OTHER_RANKS, dtype="float16")
    else:
        import jax

        from glm_jax.model import logical_axes

        mesh = jax.make_mesh((2, 2), ("pipeline", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
        mesh_axes = {"layers": "pipeline", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
        shardings = jax.tree.map(
            lambda axes: jax.NamedSharding(mesh, jax.P(*(mesh_axes.get(axis) for axis in axes))),
            logical_axes(MEDIUM),
            is_leaf=lambda axes: isinstance(axes, tuple),
        )
        params = sat.load_sharded(directory / "medium", MEDIUM, shardings)
        held = sum(shard.data.nbytes for leaf in jax.tree.leaves(params) for shard in leaf.addressable_shards)
    print(held, peak_memory())


def run(task: str, directory: Path) -> None:
    """Run one task in its own process and check its memory."""
    start = time.monotonic()
    command = [sys.executable, __file__, "--directory", str(directory), "--task", task]
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "4", "JAX_PLATFORMS": "cpu"}
    output = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment).stdout
    held, peak = map(int, output.split())
    seconds = time.monotonic() - start
    print(f"{task}: peak {peak / 1e9:.2f} GB, of which arrays {held / 1e9:.2f} GB, {seconds:.0f} s", flush=True)
    assert peak - held < LIMIT, f"{task} took more than {LIMIT / 1e9} GB"


def compare(left: Path, right: Path, cfg: GLMConfig) -> int:
    """Compare two official checkpoints and return the number of equal elements."""
    others, count = open_parameters(right, cfg), 0
    for path, one in open_parameters(left, cfg).items():
        for region in tiles(one.shape, tile_shape(one.shape)):
            chunk = one.read(region)
            assert np.array_equal(chunk, others[path].read(region)), path
            count += chunk.size
    return count


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="a folder on a disk with 48 GB free")
    parser.add_argument("--task", help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.task:
        child(arguments.task, arguments.directory)
        return
    directory = arguments.directory / "convert_memory"
    directory.mkdir(parents=True)
    try:
        shapes = {name: rule.torch_shape(axis_sizes(LARGE)) for name, rule, _ in official_tensors(LARGE)}
        largest = max(np.prod(shape) for shape in shapes.values()) * 2
        stacked = LARGE.num_layers * LARGE.hidden_size * 2 * LARGE.ffn_size * 4
        print(f"largest tensor {largest / 1e9:.2f} GB, largest stacked array {stacked / 1e9:.2f} GB", flush=True)
        assert largest >= 4e9 and stacked >= 8e9
        make_checkpoint(directory / "official", LARGE, RANKS)
        run("sat-to-orbax", directory)
        run("orbax-to-sat", directory)
        shutil.rmtree(directory / "orbax")
        equal = compare(directory / "official", directory / "back", LARGE)
        assert equal == LARGE.num_parameters
        print(f"all {equal:,} parameters came back equal", flush=True)
        shutil.rmtree(directory / "back")
        make_checkpoint(directory / "medium", MEDIUM, RANKS)
        run("load", directory)
    finally:
        shutil.rmtree(directory)


if __name__ == "__main__":
    main()
