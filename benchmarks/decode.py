"""Time greedy decoding on a CPU: ours in float32, 8 and 4 bits, another commit's, and the official torch classes'.

    python benchmarks/decode.py [--rounds 7] [--rows 4] [--context 512] [--new 32] [--against CHECKOUT]
                                [--peer torch [--peer-python PYTHON]]

All have the same random weights, contexts and two threads; `official_torch.py` says what the official side is. Reading
the contexts, with the first token of each row, is timed apart from the other tokens. The lines are medians with the
smallest and the largest round; the bound is the time it takes to read the weights and the cache once a token, at the
bandwidth of the same rounds.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import rounds
from machine import READ_BYTES
from machine import sides as machine_sides
from rounds import CORES, Measured, Side, clock, interval, ratios

if TYPE_CHECKING:
    from glm_jax.model import GLMConfig

SOP = 1
# Of the random kernels. At 1 the model repeats its last token; at 8 it is chaotic (1e-7 in the weights moves logits by
# 1.3), so that no two sides could agree.
GAIN = 1.0
OURS, AGAINST, OFFICIAL = "ours, float32", "ours, float32, the other commit", "official, float32"
Parts = tuple[Callable[[], object], Callable[[], Sequence[Sequence[int]]]]  # the first tokens, the rest


def model_config(options: argparse.Namespace) -> GLMConfig:
    """Return the model."""
    from glm_jax.model import GLMConfig

    return GLMConfig(options.layers, options.hidden, options.heads, options.ffn, options.vocabulary)


def weights(cfg: GLMConfig) -> dict[str, Any]:
    """Return the random params."""
    import jax

    from glm_jax import model

    params = model.init(cfg, jax.random.key(0))
    params["blocks"] = jax.tree.map_with_path(
        lambda path, array: GAIN * array if "kernel" in jax.tree_util.keystr(path) else array, params["blocks"]
    )
    return params


def contexts(options: argparse.Namespace) -> np.ndarray:
    """Return the contexts, int [B, S]."""
    return np.random.default_rng(0).integers(2, options.vocabulary, (options.rows, options.context))


def serve(begin: Callable[[], Parts]) -> None:
    """Be a side, whose `begin` begins a generation."""
    tokens: list[list[int]] = []

    def turn() -> dict[str, float]:
        first, rest = begin()
        times = clock("first", first)
        return times | clock("rest", lambda: tokens.__setitem__(slice(None), map(list, rest())))

    rounds.serve(turn, lambda: {"tokens": tokens})


def ours(options: argparse.Namespace) -> None:
    """Be our side, with the glm_jax that this process finds."""
    from glm_jax.engine import weights as engine_weights
    from glm_jax.engine.weights import DecodeConfig
    from glm_jax.inference.batch import Decoder, Generation, Job
    from glm_jax.inference.constraints import Vocabulary
    from glm_jax.inference.prompts import Context
    from glm_jax.inference.strategies import Greedy, Request
    from glm_jax.model.quantized import GROUPS, Scheme, quantize_params
    from glm_jax.parallel import mesh as meshes

    cfg = model_config(options)
    params = weights(cfg)
    if options.bits < 32:
        params = quantize_params(params, Scheme(options.bits, GROUPS[options.bits]))
    config = DecodeConfig(cfg, cfg.vocab_size)
    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    decoder = Decoder(config, mesh, engine_weights.place(config, mesh, params))
    jobs = [
        Job(Context([*row, SOP], len(row) - 1, repeats=False), Request(row, options.new, Greedy(min_tokens=0)))
        for row in contexts(options).tolist()
    ]

    def begin() -> Parts:
        under_way = Generation(decoder, jobs, Vocabulary(cfg.vocab_size, cfg.vocab_size, ends=()))

        def rest() -> list[list[int]]:
            under_way.advance(options.new - 1)
            return [results[0].tokens for results in under_way.results()]

        return lambda: under_way.advance(1), rest

    serve(begin)


def official(options: argparse.Namespace) -> None:
    """Be the official side."""
    import official_torch

    sizes = {
        "num_layers": options.layers, "hidden_size": options.hidden, "inner_hidden_size": options.ffn,
        "num_attention_heads": options.heads, "vocab_size": options.vocabulary, "max_sequence_length": 2048,
    }  # fmt: skip
    (checkpoint,) = options.folder.glob("*/mp_rank_00_model_states.pt")
    theirs = official_torch.load(checkpoint, sizes, CORES)
    serve(lambda: official_torch.greedy(theirs, contexts(options), SOP, options.new))


def sides(options: argparse.Namespace, words: Sequence[str]) -> list[Side]:
    """Return what takes turns."""

    def side(name: str, tree: Path, *more: str, python: str = sys.executable) -> Side:
        return Side(name, [python, __file__, *words, *more], {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(tree)})

    tree = Path(__file__).resolve().parent.parent
    held = [side(OURS, tree, "--side", "ours")]
    held += [side(f"ours, int{bits}", tree, "--side", "ours", "--bits", str(bits)) for bits in (8, 4)]
    if options.against:
        held.append(side(AGAINST, options.against.resolve(), "--side", "ours"))
    if options.peer:
        held.append(side(OFFICIAL, tree, "--side", "official", python=options.peer_python))
    return [*held, *(side for side in machine_sides() if side.name == "bandwidth")]


def read_bytes(options: argparse.Namespace) -> float:
    """Return the bytes of float32 that a token of all rows needs: every matrix once, and half the cache on average."""
    layer = 4 * options.hidden**2 + 3 * options.hidden * options.ffn
    cache = 2 * options.rows * (options.context + options.new / 2) * options.hidden
    return 4.0 * (options.layers * (layer + cache) + options.hidden * options.vocabulary)


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> bool:
    """Print medians and ratios; return whether the sides in float32 gave the same tokens."""
    bandwidth = [READ_BYTES / seconds for seconds in measured.pop("bandwidth").seconds()]
    print(f"bandwidth: {interval([rate / 1e9 for rate in bandwidth], 1)} GB/s")
    base, count = measured[OURS], options.rows * (options.new - 1)
    for name, side in measured.items():
        rate = [count / seconds for seconds in side.seconds("rest")]
        cpu = [1e3 * seconds / count for seconds in side.cpu_seconds("rest")]
        print(f"{name}: {interval(rate, 0)} tokens/s, {interval(cpu, 1)} CPU ms a token; contexts and first tokens "
              f"{interval(side.seconds('first'))} s")  # fmt: skip
        if side is not base:
            same = np.equal(side.about["tokens"], base.about["tokens"]).sum()
            for part in ("first", "rest"):
                print(f"{name} / {OURS}, {part}: {ratios(side.seconds(part), base.seconds(part))} of the seconds, "
                      f"{ratios(side.cpu_seconds(part), base.cpu_seconds(part))} of the CPU seconds")  # fmt: skip
            print(f"{name}: {same} of {options.rows * options.new} tokens as in {OURS}")
    bound = [read_bytes(options) / rate * (options.new - 1) for rate in bandwidth]
    print(f"the bound / {OURS}, rest: {ratios(bound, base.seconds('rest'))} of the seconds")
    return all(side.about == base.about for name, side in measured.items() if "float32" in name)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rounds": 7, "rows": 4, "context": 512, "new": 32, "layers": 8, "hidden": 512, "heads": 8, "ffn": 1408}
    for flag, default in {**sizes, "vocabulary": 32_000}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    parser.add_argument("--against", type=Path, help="a checkout of another commit")
    parser.add_argument("--peer", choices=["torch"])
    parser.add_argument("--peer-python", default=sys.executable, help="one that has torch")
    parser.add_argument("--side", choices=["ours", "official"], help=argparse.SUPPRESS)
    parser.add_argument("--bits", type=int, default=32, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Run the benchmark, or one side of it; return 1 if sides in float32 gave different tokens."""
    options = arguments(words)
    if options.side:
        {"ours": ours, "official": official}[options.side](options)
        return 0
    with tempfile.TemporaryDirectory() as folder:
        if options.peer:
            from glm_jax.interop import sat

            cfg = model_config(options)
            sat.save(folder, cfg, weights(cfg), tensor_parallel=1, iteration=1, dtype="float32")
            words = [*words, "--folder", folder]
        return 0 if report(options, rounds.measure(sides(options, words), options.rounds)) else 1


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(sys.argv[1:]))
