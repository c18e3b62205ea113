"""Measure what training members together saves: a group of 12 tiny members against 12 processes, one at a time.

    python benchmarks/sweep_vmapped.py [--steps 100] [--rounds 2] [--warm-steps 30]

Cold, both sides start processes of `glm_jax.sweeps.worker` with nothing compiled; the text is prepared before the clock
starts. One side is one process with all members, which computes on one core as in a sweep. The other is twelve
processes with one member each, one after the other; each may use all cores. Neither saves a checkpoint. Warm, one
process has both programs compiled and takes steps with them in turn. The medians of the rounds are compared. The last
lines are the ratio warm, and the ratio cold, which should be at least 3.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

GOAL = 3.0
WORDS = ("the", "a", "small", "large", "array", "model", "returns", "takes", "gives", "shape", "type", "of", "axis")
AXES = {"optimizer.peak_lr": (1e-3, 3e-3, 1e-2, 3e-2), "seed": (1, 2, 3)}


def tiny(folder: Path, steps: int) -> Any:
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


def seconds(jobs: Sequence[str], environment: dict[str, str]) -> float:
    """Run a worker process for each job, one after the other, and return the total time."""
    started = time.perf_counter()
    for job in jobs:
        command = [sys.executable, "-m", "glm_jax.sweeps.worker"]
        subprocess.run(command, input=job, text=True, check=True, env=environment, capture_output=True)
    return time.perf_counter() - started


def cold(folder: Path, group: Any, alone: Sequence[Any], rounds: int) -> tuple[float, float]:
    """Time both sides in turn and return the medians in seconds: together, one by one."""
    environment = {key: value for key, value in os.environ.items() if not key.startswith("JAX_COMPILATION_CACHE")}
    one_core = {**environment, "NPROC": "1"}
    together, in_turn = [], []
    for number in range(rounds):
        together.append(seconds([group.to_json(folder / f"together{number}")], one_core))
        in_turn.append(seconds([one.to_json(folder / f"alone{number}") for one in alone], environment))
        print(f"round {number + 1}: together {together[-1]:.1f} s, one by one {in_turn[-1]:.1f} s", flush=True)
    return statistics.median(together), statistics.median(in_turn)


def stepper(configs: Sequence[Any], prepared: Any) -> Callable[[], None]:
    """Compile the step of members that are trained together, and return a function that takes one step."""
    import jax
    import numpy as np

    from glm_jax.sweeps import group as sweep_group

    step, states, streams = sweep_group.begin(configs, prepared)
    batches = streams.at(1)
    rates, alphas = np.full(len(configs), 1e-3, np.float32), np.ones(len(configs), np.float32)

    def take() -> None:
        nonlocal states
        states, metrics = step(states, batches, rates, alphas)
        jax.block_until_ready(metrics)

    take()
    return take


def warm(configs: Sequence[Any], steps: int) -> tuple[float, float]:
    """Time single steps in turn; return the medians in seconds for a step of all members: together, one by one."""
    from glm_jax.sweeps import group as sweep_group

    prepared = sweep_group.prepare_all(configs, lambda line: None)
    takes = [stepper(configs, prepared), stepper(configs[:1], prepared)]
    times: list[list[float]] = [[], []]
    for _ in range(steps):
        for take, taken in zip(takes, times, strict=True):
            started = time.perf_counter()
            take()
            taken.append(time.perf_counter() - started)
    return statistics.median(times[0]), statistics.median(times[1]) * len(configs)


def main() -> None:
    """Run the benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=100, help="steps of each member, cold")
    parser.add_argument("--rounds", type=int, default=2, help="how often both sides run, cold")
    parser.add_argument("--warm-steps", type=int, default=30, help="steps to time on each side, warm")
    arguments = parser.parse_args()
    from glm_jax.sweeps import group as sweep_group
    from glm_jax.sweeps import members as sweep_members

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        members = sweep_members.expand(tiny(folder, arguments.steps), sweep_members.read_axes(AXES))
        (group,) = sweep_members.group(members)
        alone = sweep_members.group(members, together=1)
        configs = [member.config for member in members]
        sweep_group.prepare_all(configs, lambda line: None)
        whole, parts = cold(folder, group, alone, arguments.rounds)
        print(
            f"cold, {len(members)} members, {arguments.steps} steps: together {whole:.1f} s, one by one {parts:.1f} s"
        )
        warm_whole, warm_parts = warm(configs, arguments.warm_steps)
        print(f"warm, a step of all: together {warm_whole * 1e3:.1f} ms, one by one {warm_parts * 1e3:.1f} ms")
        print(f"ratio warm: {warm_parts / warm_whole:.1f}")
        print(f"ratio cold: {parts / whole:.1f} (goal: at least {GOAL:.0f})")
        if parts / whole < GOAL:
            sys.exit(1)


if __name__ == "__main__":
    main()
