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
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import machine
import numpy as np
import rounds
import shared
from rounds import Measured, Side, clock, compare, interval, ratios

if TYPE_CHECKING:
    from glm_jax.model import GLMConfig

SOP = 1
# Of the random kernels. At 1 the model repeats its last token; at 8 it is chaotic (1e-7 in the weights moves logits by
# 1.3), so that no two sides could agree.
GAIN = 1.0
OURS, AGAINST, OFFICIAL = "ours, float32", "ours, float32, the other commit", "official, float32"
Parts = tuple[Callable[[], object], Callable[[], Sequence[Sequence[int]]]]  # the first tokens, the rest


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

    cfg = shared.config(options)
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

    theirs = shared.official(options, 2048)
    serve(lambda: official_torch.greedy(theirs, contexts(options), SOP, options.new))


def sides(options: argparse.Namespace, words: Sequence[str]) -> list[Side]:
    """Return what takes turns."""
    mine = (__file__, *words, "--side", "ours")
    held = [rounds.script(OURS, *mine)]
    held += [rounds.script(f"ours, int{bits}", *mine, "--bits", str(bits)) for bits in (8, 4)]
    if options.against:
        held.append(rounds.script(AGAINST, *mine, tree=options.against))
    if options.peer:
        held.append(rounds.script(OFFICIAL, __file__, *words, "--side", "official", python=options.peer_python))
    return [*held, machine.side("bandwidth")]


def read_bytes(options: argparse.Namespace) -> float:
    """Return the bytes of float32 that a token of all rows needs: every matrix once, and half the cache on average."""
    layer = 4 * options.hidden**2 + 3 * options.hidden * options.ffn
    cache = 2 * options.rows * (options.context + options.new / 2) * options.hidden
    return 4.0 * (options.layers * (layer + cache) + options.hidden * options.vocabulary)


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> bool:
    """Print medians and ratios; return whether the sides in float32 gave the same tokens."""
    bandwidth = [machine.READ_BYTES / seconds for seconds in measured.pop("bandwidth").seconds()]
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
                print(compare(measured, name, OURS, part))
            print(f"{name}: {same} of {options.rows * options.new} tokens as in {OURS}")
    bound = [read_bytes(options) / rate * (options.new - 1) for rate in bandwidth]
    print(f"the bound / {OURS}, rest: {ratios(bound, base.seconds('rest'))} of the seconds")
    return all(side.about == base.about for name, side in measured.items() if "float32" in name)


def arguments(words: Sequence[str]) -> argparse.Namespace:
    """Read the command line."""
    sizes = {"rows": 4, "context": 512, "new": 32, **shared.MODEL, "ffn": 1408, "vocabulary": 32_000}
    parser = shared.parser(__doc__, sizes)
    shared.add_against(parser)
    shared.add_peer(parser)
    parser.add_argument("--bits", type=int, default=32, help=argparse.SUPPRESS)
    return parser.parse_args(words)


def main(words: Sequence[str]) -> int:
    """Run the benchmark, or one side of it; return 1 if sides in float32 gave different tokens."""
    options = arguments(words)
    if options.side:
        {"ours": ours, "official": official}[options.side](options)
        return 0
    with shared.for_peer(options, words, lambda: weights(shared.config(options))) as words:
        return 0 if report(options, rounds.measure(sides(options, words), options.rounds)) else 1


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(sys.argv[1:]))
