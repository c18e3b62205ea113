"""Measure what training members together saves: a group of 12 tiny members against 12 processes, one at a time.

    python benchmarks/sweep_vmapped.py [--rounds 2] [--steps 100] [--warm-rounds 7]

Cold, both sides start processes of `glm_jax.sweeps.worker` with nothing compiled; the text is prepared before. One side
is one process with all members, which computes on one core as in a sweep. The other is twelve processes with one member
each, one after the other; each may use all cores. Neither saves a checkpoint. Warm, each side has its program compiled
and takes 10 steps a turn; a member's steps alone count twelve times. The lines are medians with the smallest and the
largest round. The last one is the ratio of the seconds cold, whose median should be at least 3.
"""

from __future__ import annotations

import argparse
import json
import operator
import os
import random
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import rounds
import shared
from rounds import compare, interval, ratios

if TYPE_CHECKING:
    from glm_jax.config import Experiment

GOAL = 3.0
WORDS = ("the", "a", "small", "large", "array", "model", "returns", "takes", "gives", "shape", "type", "of", "axis")
AXES = {"optimizer.peak_lr": (1e-3, 3e-3, 1e-2, 3e-2), "seed": (1, 2, 3)}
TOGETHER, ALONE = "together", "one by one"
STEPS = 10  # of a warm turn


def tiny(folder: Path, steps: int) -> Experiment:
    """Write a small corpus into `folder` and return a resolved config for it: 2 layers of 16, rows of 32 tokens."""
    from glm_jax import config as configs

    draw = random.Random(0)
    texts = [" ".join(draw.choices(WORDS, k=60)) + "." for _ in range(60)]
    (folder / "text.txt").write_text("\n\n".join(texts), encoding="utf-8")
    config = configs.default_config()
    config.model.update(num_layers=2, hidden_size=16, num_heads=2, ffn_size=24, vocab_multiple=16)
    config.data.update(cache=str(folder / "cache"), seq_length=32)
    config.data.tokenizer.vocab_size = 300
    config.data.sources.en = configs.source(path=str(folder / "text.txt"))
    config.train.update(steps=steps, global_batch=4, eval_every=0)
    return configs.resolve(config)


def cold(options: argparse.Namespace) -> None:
    """Be a side that starts a worker process for each job of a file, one after the other."""
    jobs = [json.loads(line) for line in (options.folder / f"{options.side}.jsonl").read_text().splitlines()]
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    command = [sys.executable, "-m", "glm_jax.sweeps.worker"]

    def turn() -> dict[str, float]:
        with tempfile.TemporaryDirectory(dir=options.folder) as workdir:
            for job in jobs:
                given = json.dumps(job | {"workdir": workdir})
                subprocess.run(command, input=given, text=True, check=True, env=environment, capture_output=True)
        return {}

    rounds.serve(turn, warm=False)


def warm(options: argparse.Namespace) -> None:
    """Be a side that takes steps of all members together, or of one."""
    import jax
    import numpy as np

    from glm_jax.config import resolve
    from glm_jax.sweeps import group

    (job, *_) = map(json.loads, (options.folder / f"{options.side}.jsonl").read_text().splitlines())
    configs = [resolve(member["config"]) for member in job["members"]]
    step, states, streams = group.begin(configs, group.prepare_all(configs, lambda line: None))
    batches = streams.at(1)
    rates, alphas = np.full(len(configs), 1e-3, np.float32), np.ones(len(configs), np.float32)

    def turn() -> dict[str, float]:
        nonlocal states
        for _ in range(STEPS):
            states, metrics = step(states, batches, rates, alphas)
            jax.block_until_ready(metrics)
        return {}

    rounds.serve(turn)


def write_jobs(folder: Path, steps: int) -> int:
    """Prepare the text and write each side's jobs; return how many members there are."""
    from glm_jax.sweeps import group, members

    all_members = members.expand(tiny(folder, steps), members.read_axes(AXES))
    group.prepare_all([member.config for member in all_members], lambda line: None)
    for name, together in ((TOGETHER, len(all_members)), (ALONE, 1)):
        groups = members.group(all_members, together=together)
        (folder / f"{name}.jsonl").write_text("".join(f"{one.to_json(folder)}\n" for one in groups))
    return len(all_members)


def main(words: Sequence[str]) -> int:
    """Run the benchmark, or one side of it; return 1 if the ratio cold is below the goal."""
    parser = shared.parser(__doc__, {"rounds": 2, "steps": 100, "warm-rounds": 7})
    parser.add_argument("--warm", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(words)
    if options.side:
        (warm if options.warm else cold)(options)
        return 0
    with tempfile.TemporaryDirectory() as name:
        count = write_jobs(Path(name), options.steps)

        def side(kind: str, *more: str, **environment: str) -> rounds.Side:
            named = ("--folder", name, "--side", kind, *more)
            return rounds.script(kind, __file__, *words, *named, environment=environment)

        steady = rounds.measure([side(TOGETHER, "--warm", NPROC="1"), side(ALONE, "--warm")], options.warm_rounds)
        measured = rounds.measure([side(TOGETHER, NPROC="1"), side(ALONE)], options.rounds)
    whole = [1e3 * seconds / STEPS for seconds in steady[TOGETHER].seconds()]
    parts = [1e3 * seconds / STEPS * count for seconds in steady[ALONE].seconds()]
    print(f"warm, a step of {count} members: {TOGETHER} {interval(whole, 1)} ms, {ALONE} {interval(parts, 1)} ms")
    print(f"warm, {ALONE} / {TOGETHER}: {ratios(parts, whole)} of the seconds")
    for kind, side_measured in measured.items():
        print(f"cold, {options.steps} steps, {kind}: {interval(side_measured.seconds(), 1)} s")
    print(f"cold, {compare(measured, ALONE, TOGETHER)} (goal: at least {GOAL:.0f})")
    saved = map(operator.truediv, measured[ALONE].seconds(), measured[TOGETHER].seconds())
    return int(statistics.median(saved) < GOAL)


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    sys.exit(main(sys.argv[1:]))
