"""Time conversions of weights beside copying as many bytes.

    python benchmarks/convert.py [--rounds 7] [--layers 8] [--hidden 512] ...

The same weights, in float32: `copy` reads files of a workdir's checkpoint and writes them again, on the disk before it
ends, as a conversion does; the others are `glm-jax convert`'s own functions, to and from official checkpoints and
Hugging Face folders. Everything lies in the folder for temporary files. The lines are MB of float32 a second, medians
with the smallest and the largest round.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import rounds
import shared
from rounds import Measured, compare, interval

COPY = "copy"
CONVERSIONS = ("sat-to-orbax", "hf-to-orbax", "orbax-to-sat", "orbax-to-hf")


def prepare(options: argparse.Namespace, folder: Path) -> int:
    """Write the weights in each form, and return their bytes in float32."""
    import jax

    from glm_jax import model
    from glm_jax.interop import convert, huggingface, sat
    from glm_jax.interop.weights import open_weights
    from glm_jax.model import GLMConfig

    shape = (options.layers, options.hidden, options.heads, 4 * options.hidden, options.vocabulary, 513)
    cfg = GLMConfig(*shape, norm="pre", position="learned_2d", activation="gelu")  # that both forms take
    params = model.init(cfg, jax.random.key(0))
    sat.save(folder / "sat", cfg, params, tensor_parallel=1, iteration=1, dtype="float32")
    huggingface.save(folder / "hf", cfg, params)
    convert.to_workdir(open_weights(folder / "hf"), folder / "orbax", convert.experiment(cfg))
    return sum(array.nbytes for array in jax.tree.leaves(params))


def serve(options: argparse.Namespace) -> None:
    """Be one side."""
    from glm_jax.config.fields import to_dict
    from glm_jax.interop import convert, huggingface
    from glm_jax.interop.weights import open_weights

    folder = options.folder
    cfg = huggingface.config(folder / "hf")
    out = folder / f"{options.side}.out"

    def copy() -> None:
        for path in sorted(path for path in (folder / "orbax").rglob("*") if path.is_file()):
            to = out / path.relative_to(folder)
            to.parent.mkdir(parents=True, exist_ok=True)
            with open(path, "rb") as source, open(to, "wb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())

    def to_workdir(form: str) -> None:
        given = to_dict(cfg) if form == "sat" else {}
        convert.to_workdir(open_weights(folder / form, given), out, convert.experiment(cfg))

    works: dict[str, Callable[[], object]] = {
        COPY: copy,
        "sat-to-orbax": lambda: to_workdir("sat"),
        "hf-to-orbax": lambda: to_workdir("hf"),
        "orbax-to-sat": lambda: convert.orbax_to_sat(open_weights(folder / "orbax"), out, 1, iteration=1),
        "orbax-to-hf": lambda: convert.orbax_to_hf(open_weights(folder / "orbax"), out),
    }

    def turn() -> dict[str, float]:
        shutil.rmtree(out, ignore_errors=True)
        return rounds.clock("work", works[options.side])

    rounds.serve(turn)


def report(size: int, measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    print(f"{size / 1e6:.0f} MB of float32")
    for name, side in measured.items():
        rate = [size / 1e6 / seconds for seconds in side.seconds("work")]
        print(f"{name}: {interval(rate, 0)} MB/s, {interval(side.cpu_seconds('work'))} CPU s")
        if name != COPY:
            print(compare(measured, name, COPY, "work"))


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    options = shared.parser(__doc__, {"layers": 8, "hidden": 512, "heads": 8, "vocabulary": 8192}).parse_args(words)
    if options.side:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        size = prepare(options, Path(folder))
        sides = [
            rounds.script(name, __file__, *words, "--folder", folder, "--side", name) for name in (COPY, *CONVERSIONS)
        ]
        report(size, rounds.measure(sides, options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
