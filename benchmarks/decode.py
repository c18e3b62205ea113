"""Measure greedy decoding on a CPU: ours in float32, 8 and 4 bits, beside the official torch classes.

    python benchmarks/decode.py [--rounds 9] [--rows 4] [--context 512] [--new 64] [--layers 8] [--hidden 512]

The official side is GLM130B of SwissArmyTransformer 0.4.12 with its own key/value cache (`official_torch.py` says what
stands in for a GPU); without torch or SwissArmyTransformer only ours are measured. All sides have the same random
weights, which go from one to the other through a checkpoint in the official layout, the same contexts, and two threads.
They take turns, so that other work on the machine matters little. Reading the context and the first token are timed
apart from the other tokens. The lines are medians of wall-clock and CPU seconds, and ratios to ours in float32 with
the smallest and largest of the rounds.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

THREADS = 2
os.environ |= {"NPROC": str(THREADS), "OMP_NUM_THREADS": str(THREADS), "JAX_PLATFORMS": "cpu"}
os.environ["OMP_WAIT_POLICY"] = "passive"  # a thread of torch that waits would count as CPU time

import jax  # noqa: E402 (reads the environment)
import official_torch  # noqa: E402

from glm_jax import model  # noqa: E402
from glm_jax.engine import weights  # noqa: E402
from glm_jax.engine.weights import DecodeConfig  # noqa: E402
from glm_jax.inference.batch import Decoder, Generation, Job  # noqa: E402
from glm_jax.inference.constraints import Vocabulary  # noqa: E402
from glm_jax.inference.prompts import Context  # noqa: E402
from glm_jax.inference.strategies import Greedy, Request  # noqa: E402
from glm_jax.interop import sat  # noqa: E402
from glm_jax.model import GLMConfig  # noqa: E402
from glm_jax.model.quantized import GROUPS, Scheme, quantize_params  # noqa: E402
from glm_jax.parallel import mesh as meshes  # noqa: E402

SOP = 1
# Of the random kernels. At 1 the model repeats its last token; at 8 it is chaotic (1e-7 in the weights moves logits by
# 1.3), so that no two sides could agree.
GAIN = 1.0
Tokens = list[list[int]]
Sides = dict[str, Callable[[], tuple[Callable[[], Any], Callable[[], Tokens]]]]


class Times(NamedTuple):
    """Seconds of one round."""

    first: float  # wall clock: the contexts, and one token of each row
    first_cpu: float
    rest: float  # wall clock: the other tokens
    rest_cpu: float


def ours(cfg: GLMConfig, params: Any, contexts: np.ndarray, new: int) -> Callable[[], Any]:
    """Return what begins a generation with our engine, and returns its two parts."""
    config = DecodeConfig(cfg, cfg.vocab_size)
    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    decoder = Decoder(config, mesh, weights.place(config, mesh, params))
    jobs = [
        Job(Context([*row, SOP], len(row) - 1, repeats=False), Request(row, new, Greedy(min_tokens=0)))
        for row in contexts.tolist()
    ]

    def begin() -> tuple[Callable[[], None], Callable[[], Tokens]]:
        under_way: list[Generation] = []

        def first() -> None:
            under_way.append(Generation(decoder, jobs, Vocabulary(cfg.vocab_size, cfg.vocab_size, ends=())))
            under_way[0].advance(1)

        def rest() -> Tokens:
            under_way[0].advance(new - 1)
            return [results[0].tokens for results in under_way[0].results()]

        return first, rest

    return begin


def official(cfg: GLMConfig, params: Any, contexts: np.ndarray, new: int) -> Callable[[], Any]:
    """Return the same with the official classes.

    Raises:
        ImportError: torch or SwissArmyTransformer is not installed.
    """
    sizes = {
        "num_layers": cfg.num_layers, "hidden_size": cfg.hidden_size, "inner_hidden_size": cfg.ffn_size,
        "num_attention_heads": cfg.num_heads, "vocab_size": cfg.vocab_size, "max_sequence_length": cfg.max_length,
    }  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        sat.save(folder, cfg, params, tensor_parallel=1, iteration=1, dtype="float32")
        (checkpoint,) = Path(folder).glob("*/mp_rank_00_model_states.pt")
        theirs = official_torch.load(checkpoint, sizes, THREADS)
    return lambda: official_torch.greedy(theirs, contexts, SOP, new)


def measure(sides: Sides, rounds: int) -> tuple[dict[str, list[Times]], dict[str, Tokens]]:
    """Run all sides in turn, once to warm up and then `rounds` times; return the times and the tokens of each."""
    times: dict[str, list[Times]] = {name: [] for name in sides}
    tokens: dict[str, Tokens] = {}
    for turn in range(rounds + 1):
        for name, begin in sides.items():
            clocks = []
            for part in begin():
                wall, cpu = time.perf_counter(), time.process_time()
                tokens[name] = part()
                clocks += [time.perf_counter() - wall, time.process_time() - cpu]
            if turn:
                times[name].append(Times(*clocks))
    return times, tokens


def report(times: dict[str, list[Times]], tokens: dict[str, Tokens], base: str) -> bool:
    """Print medians and ratios; return whether the sides in float32 gave the same tokens."""
    rows, new = len(tokens[base]), len(tokens[base][0])
    for name, each in times.items():
        first, first_cpu, rest, rest_cpu = map(statistics.median, zip(*each, strict=True))
        count = rows * (new - 1)
        print(f"{name}: {count / rest:.0f} tokens/s, {1e3 * rest_cpu / count:.2f} CPU ms a token; contexts and first "
              f"tokens {first:.2f} s, {first_cpu:.2f} CPU s")  # fmt: skip
    for name in (name for name in times if name != base):
        for field in Times._fields:
            pairs = zip(times[name], times[base], strict=True)
            ratios = sorted(getattr(theirs, field) / getattr(held, field) for theirs, held in pairs)
            print(
                f"{name} / {base}, {field}: ratio {statistics.median(ratios):.2f} ({ratios[0]:.2f} to {ratios[-1]:.2f})"
            )
        pairs = zip(np.ravel(tokens[name]), np.ravel(tokens[base]), strict=True)
        print(f"{name}: {sum(left == right for left, right in pairs)} of {rows * new} tokens as in {base}, "
              f"{len(np.unique(tokens[name]))} different ones")  # fmt: skip
    return all(tokens[name] == tokens[base] for name in times if "float32" in name)


def arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = {"rounds": 9, "rows": 4, "context": 512, "new": 64, "layers": 8, "hidden": 512, "heads": 8, "ffn": 1408}
    for flag, default in {**sizes, "vocabulary": 32_000}.items():
        parser.add_argument(f"--{flag}", type=int, default=default)
    return parser.parse_args(words)


def main() -> int:
    """Run the benchmark; return 1 if the official classes gave other tokens."""
    options = arguments()
    cfg = GLMConfig(options.layers, options.hidden, options.heads, options.ffn, options.vocabulary)
    params = model.init(cfg, jax.random.key(0))
    params["blocks"] = jax.tree.map_with_path(
        lambda path, array: GAIN * array if "kernel" in jax.tree_util.keystr(path) else array, params["blocks"]
    )
    contexts = np.random.default_rng(0).integers(2, cfg.vocab_size, (options.rows, options.context))
    base = "ours, float32"
    sides: Sides = {base: ours(cfg, params, contexts, options.new)}
    for bits in (8, 4):
        quantised = quantize_params(params, Scheme(bits, GROUPS[bits]))
        sides[f"ours, int{bits}"] = ours(cfg, quantised, contexts, options.new)
    try:
        sides["official, float32"] = official(cfg, params, contexts, options.new)
    except ImportError as error:
        print(f"left out: the official classes ({error}: pip install torch einops SwissArmyTransformer==0.4.12)")
    print(f"{cfg.num_parameters / 1e6:.0f} M parameters, {options.rows} rows, {options.context} tokens of context, "
          f"{options.new} new; {options.rounds} rounds, {THREADS} threads, jax {jax.__version__}")  # fmt: skip
    return 0 if report(*measure(sides, options.rounds), base) else 1


if __name__ == "__main__":
    sys.exit(main())
