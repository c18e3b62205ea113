"""Fills and scores on meshes of 8 emulated devices, 1 or 2 processes; run in subprocesses.

`python -m tests.inference.meshes PORT COUNT INDEX` prints one JSON object a mesh, from process 0: the tokens of three
strategies, scores, the idle ticks of the stages, and, with one process, what the compiled program communicates.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import sys
from typing import Any

PORT, COUNT, INDEX = (int(argument) for argument in sys.argv[1:4]) if __name__ == "__main__" else (0, 1, 0)

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = str(8 // COUNT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the work

import numpy as np  # noqa: E402 (after the environment, as jax reads it)

from glm_jax.engine import decode  # noqa: E402
from glm_jax.engine.weights import place  # noqa: E402
from glm_jax.inference.batch import Generation, fetch  # noqa: E402
from glm_jax.inference.scoring import score  # noqa: E402
from glm_jax.inference.strategies import Beam, Greedy, Options, Sample  # noqa: E402
from glm_jax.interop import arrays, decoding, sources  # noqa: E402
from glm_jax.model import quantized  # noqa: E402
from glm_jax.model.quantized import Scheme  # noqa: E402
from glm_jax.parallel import processes  # noqa: E402
from tests.inference import tiny  # noqa: E402

MESHES = [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)] if COUNT == 1 else [(2, 2, 2)]
SAMPLED, BEAM = Sample(temperature=1.5, top_p=0.9), Beam(count=2, no_repeat_ngram=2)
OPTIONS: dict[str, list[Options]] = {"row": [Greedy(), SAMPLED], "beam": [BEAM, BEAM]}  # of even and odd jobs
JOBS, TURNS = 16, 7
INT4 = [(1, 1, 1), (2, 2, 2)]


def collectives(generation: Any, decoder: Any) -> dict[str, int]:
    """Return the largest result, in numbers, of each kind of collective in the compiled program of a token."""
    arguments = (generation._state, generation._positions, generation._settings, np.int32(1))
    lowered = decode.decode.lower(decoder.config, decoder.mesh, generation._strategy, decoder.weights, *arguments)
    largest: dict[str, int] = {}
    for line in (lowered.compile().as_text() or "").splitlines():
        pattern = r" (all-gather|all-reduce|reduce-scatter|collective-permute|all-to-all)(?:-start)?\("
        if found := re.search(pattern, line):
            shapes = re.findall(r"\w+\[([\d,]*)\]", line[: found.start()])
            sizes = [int(np.prod([int(size) for size in shape.split(",") if size])) for shape in shapes]
            largest[found[1]] = max(largest.get(found[1], 0), *sizes)
    return largest


def run(sizes: tuple[int, int, int]) -> None:
    """Generate, score, and print what came out."""
    decoder = tiny.decoder(tiny.DEEP, *sizes)
    if sizes == (1, 4, 2):  # as from the disk
        stored = arrays.sources(tiny.params(tiny.DEEP))
        decoder = dataclasses.replace(decoder, weights=decoding.read(decoder.config, decoder.mesh, stored))
    report: dict[str, Any] = {"mesh": sizes, "tokens": {}}
    for name, options in OPTIONS.items():
        jobs = [tiny.job(number, TURNS, options[number % 2]) for number in range(JOBS)]
        generation = Generation(decoder, jobs, tiny.VOCABULARY)
        if name == "row" and COUNT == 1:
            report["collectives"] = collectives(generation, decoder)
        generation.advance(TURNS)
        report["tokens"][name] = [[one.tokens for one in found] for found in generation.results()]
        if name == "row":
            report["busy"] = fetch(decoder.mesh, generation._state.busy).tolist()
            report["ticks"] = int(fetch(decoder.mesh, generation._state.ticks))
    if sizes in INT4:
        params, scheme = tiny.params(tiny.DEEP), Scheme(4, group=8)
        if sizes == (1, 1, 1):
            weights = place(decoder.config, decoder.mesh, quantized.quantize_params(params, scheme))
        else:  # as from the disk
            parameters = sources.quantize(arrays.sources(params), scheme)
            weights = decoding.read(decoder.config, decoder.mesh, parameters)
        jobs = [tiny.job(number, TURNS, OPTIONS["row"][number % 2]) for number in range(JOBS)]
        generation = Generation(dataclasses.replace(decoder, weights=weights), jobs, tiny.VOCABULARY)
        generation.advance(TURNS)
        report["int4"] = [[one.tokens for one in found] for found in generation.results()]
    pairs = [(tiny.job(number).context, [5, 6 + number]) for number in range(JOBS)]
    report["scores"] = [found.log_probability for found in score(decoder, pairs)]
    if INDEX == 0:
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    if COUNT > 1:
        processes.start(f"127.0.0.1:{PORT}", COUNT, INDEX, timeout=300)
    for sizes in MESHES:
        run(sizes)
