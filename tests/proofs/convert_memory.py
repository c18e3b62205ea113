"""Show that conversion and loading stay under 2 GB of resident memory, whatever the model's size.

    python tests/proofs/convert_memory.py --directory /some/disk

makes up an official checkpoint with an embedding of 4.3 GB in float16 and, once converted, a stacked feed-forward array
of 8.6 GB. It converts the checkpoint to orbax and back with another number of ranks, each in its own process, and reads
the peak of the process's resident memory (VmHWM). It compares the result with the original, chunk by chunk. Then it
does the same with a Hugging Face folder of 5.9 G parameters, and loads a smaller model onto four emulated devices.
Needs 48 GB of disk and, for loading, 9 GB of memory; takes about twenty minutes. `--only huggingface` proves that part.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np

from glm_jax.config.fields import to_dict
from glm_jax.interop import convert, huggingface, sat
from glm_jax.interop.layout import HUGGING_FACE, axis_sizes, official_tensors, tile_shape, tiles
from glm_jax.interop.safetensors_file import write_safetensors
from glm_jax.interop.shards import RANK_FILE, open_parameters
from glm_jax.interop.sources import Source
from glm_jax.interop.torch_archive import TensorStream, write_archive
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig
from glm_jax.workdir.checkpoint_format import ParamPath

LIMIT = 2e9
LARGE = GLMConfig(num_layers=32, hidden_size=2048, num_heads=16, ffn_size=16384, vocab_size=2**20)
ORIGINAL = GLMConfig(32, 2048, 16, 4 * 2048, 2**21, 1025, norm="pre", position="learned_2d", activation="gelu")
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


def make_folder(root: Path, cfg: GLMConfig) -> None:
    """Write the weights of a Hugging Face folder, made-up float16 numbers in one file."""
    streams = {}
    for place, (name, rule, _) in enumerate(official_tensors(cfg, HUGGING_FACE)):
        shape = rule.torch_shape(axis_sizes(cfg))
        streams[name] = TensorStream(shape, np.dtype(np.float16), made_up(place, shape))
    root.mkdir()
    write_safetensors(root / "model.safetensors", streams)
    sizes = {"num_layers": cfg.num_layers, "hidden_size": cfg.hidden_size, "num_attention_heads": cfg.num_heads,
             "vocab_size": cfg.vocab_size, "max_sequence_length": cfg.max_length - 1}  # fmt: skip
    (root / "config.json").write_text(json.dumps({"model_type": "glm", **sizes}))


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
    elif task == "hf-to-orbax":
        weights = open_weights(directory / "official")
        convert.to_workdir(weights, directory / "orbax", convert.experiment(weights.config))
    elif task == "orbax-to-hf":
        convert.orbax_to_hf(open_weights(directory / "orbax"), directory / "back", dtype="float16")
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


def compare(left: Mapping[ParamPath, Source], right: Mapping[ParamPath, Source], parameters: int) -> None:
    """Check that two opened checkpoints of so many parameters are equal."""
    count = 0
    for path, one in left.items():
        for region in tiles(one.shape, tile_shape(one.shape)):
            chunk = one.read(region)
            assert np.array_equal(chunk, right[path].read(region)), path
            count += chunk.size
    assert count == parameters
    print(f"all {count:,} parameters came back equal", flush=True)


def prove_sat(directory: Path) -> None:
    """Convert an official checkpoint there and back."""
    shapes = {name: rule.torch_shape(axis_sizes(LARGE)) for name, rule, _ in official_tensors(LARGE)}
    largest = max(np.prod(shape) for shape in shapes.values()) * 2
    stacked = LARGE.num_layers * LARGE.hidden_size * 2 * LARGE.ffn_size * 4
    print(f"largest tensor {largest / 1e9:.2f} GB, largest stacked array {stacked / 1e9:.2f} GB", flush=True)
    assert largest >= 4e9 and stacked >= 8e9
    make_checkpoint(directory / "official", LARGE, RANKS)
    run("sat-to-orbax", directory)
    run("orbax-to-sat", directory)
    back = open_parameters(directory / "back", LARGE)
    compare(open_parameters(directory / "official", LARGE), back, LARGE.num_parameters)


def prove_huggingface(directory: Path) -> None:
    """Convert a Hugging Face folder there and back, into several files."""
    make_folder(directory / "official", ORIGINAL)
    run("hf-to-orbax", directory)
    run("orbax-to-hf", directory)
    assert (directory / "back/model.safetensors.index.json").exists()
    back = huggingface.open_parameters(directory / "back", ORIGINAL)
    compare(huggingface.open_parameters(directory / "official", ORIGINAL), back, ORIGINAL.num_parameters)


def prove_loading(directory: Path) -> None:
    """Load an official checkpoint onto devices."""
    make_checkpoint(directory / "medium", MEDIUM, RANKS)
    run("load", directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--directory", type=Path, required=True, help="a folder on a disk with 48 GB free")
    parser.add_argument("--only", choices=PROOFS, help="one part of the proof")
    parser.add_argument("--task", help="used by the script itself")
    arguments = parser.parse_args()
    if arguments.task:
        child(arguments.task, arguments.directory)
        return
    directory = arguments.directory / "convert_memory"
    for name in [arguments.only] if arguments.only else PROOFS:
        directory.mkdir(parents=True)
        try:
            PROOFS[name](directory)
        finally:
            shutil.rmtree(directory)


PROOFS = {"sat": prove_sat, "huggingface": prove_huggingface, "loading": prove_loading}


if __name__ == "__main__":
    main()
