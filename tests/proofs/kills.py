"""Kill runs at random moments, some inside a save, restart them until they are done, and compare their numbers.

    python tests/proofs/kills.py [--runs 20] [--kills 3] [--workers 2] [--seed 0]

Each run takes 50 float32 steps of the tiny experiment and saves every 5. Half of the runs stay on one device and must
repeat the uninterrupted run bit for bit. The others resume on another mesh at each restart; their losses must be within
1e-5 of the uninterrupted run's. The proof fails if a start finds a damaged checkpoint: an interrupted save must not
leave one.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import dataclasses
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
sys.path.insert(0, str(ROOT))

from tests.end_to_end.conftest import CHINESE, ENGLISH, EXPERIMENT  # noqa: E402 (needs the path)

CLOCK = {"tokens_per_second", "mfu", "hfu", "mfu_formula", "hfu_formula", "data_wait", "memory"}
TEMPORARY = "*.orbax-checkpoint-tmp*"
ONE = (1, 1, 1)
MESHES = (ONE, (2, 1, 1), (1, 2, 1), (1, 1, 2), (2, 2, 1), (2, 1, 2), (1, 2, 2), (4, 1, 1))  # data, pipeline, tensor
TOLERANCE = 1e-5
PATIENCE = 900  # seconds that a start may take, compiling included


@dataclasses.dataclass(frozen=True)
class Kill:
    """When to kill a start: `delay` seconds after it began, showed a step, or was seen in a save."""

    where: str  # start, step, save
    delay: float
    step: int = 0  # for step and save, the first step of the run at which to kill


@dataclasses.dataclass
class Outcome:
    """How a run went."""

    kills: list[str]
    meshes: list[tuple[int, int, int]]
    damaged: list[str]


def write_experiment(folder: Path) -> Path:
    """Write the tiny experiment of the end-to-end tests with its own text."""
    draw = random.Random(1)
    english = [" ".join(draw.choices(ENGLISH, k=60)) + "." for _ in range(120)]
    chinese = ["".join(draw.choices(CHINESE, k=90)) + "。" for _ in range(120)]
    (folder / "en.txt").write_text("\n\n".join(english), encoding="utf-8")
    (folder / "zh.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in chinese), encoding="utf-8")
    path = folder / "tiny.py"
    path.write_text(EXPERIMENT.format(cache=folder / "cache", texts=folder), encoding="utf-8")
    return path


def start(experiment: Path, workdir: Path, flags: Sequence[str], mesh: tuple[int, int, int]) -> subprocess.Popen[str]:
    """Start `glm-jax train` with one device for each position of the mesh."""
    environment = {
        "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".jax_cache"),
        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        "XLA_FLAGS": "--xla_backend_optimization_level=0",
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "JAX_NUM_CPU_DEVICES": str(mesh[0] * mesh[1] * mesh[2]),
        "PYTHONPATH": str(ROOT),
    }
    laid = [f"--config.mesh.{axis}={size}" for axis, size in zip(("data", "pipeline", "tensor"), mesh, strict=True)]
    command = ["-m", "glm_jax", "train", "--config", str(experiment), "--workdir", str(workdir), *flags, *laid]
    with open(log(workdir), "ab") as said:
        return subprocess.Popen(
            [sys.executable, *command], env=environment, stdout=subprocess.DEVNULL, stderr=said, text=True
        )


def log(workdir: Path) -> Path:
    """Return the file that holds the output of all starts of a run."""
    return workdir.with_name(f"{workdir.name}.log")


def last_step(workdir: Path) -> int:
    """Return the step of the last complete train event."""
    metrics = workdir / "metrics.jsonl"
    lines = metrics.read_text(encoding="utf-8").split("\n")[:-1] if metrics.exists() else []
    return max((json.loads(line)["step"] for line in lines if '"train"' in line), default=0)


def kill_at(process: subprocess.Popen[str], workdir: Path, kill: Kill) -> str | None:
    """Wait for the moment and kill; return where the run was, or None if it ended before."""
    folder, deadline = workdir / "checkpoints", time.monotonic() + PATIENCE
    reached: Callable[[], bool] = lambda: True  # noqa: E731
    if kill.where == "step":
        reached = lambda: last_step(workdir) >= kill.step  # noqa: E731
    if kill.where == "save":
        saving = lambda path: int(path.name.split(".")[0]) >= kill.step  # noqa: E731
        reached = lambda: any(map(saving, folder.glob(TEMPORARY)))  # noqa: E731
    while process.poll() is None and not reached():
        if time.monotonic() > deadline:
            process.kill()
            raise RuntimeError(f"{workdir} did not get to {kill} within {PATIENCE} seconds")
        time.sleep(0.001 if kill.where == "save" else 0.01)
    time.sleep(kill.delay)
    process.kill()
    if process.wait() != -9:
        return None
    cut = sorted(path.name.split(".")[0] for path in folder.glob(TEMPORARY))
    return f"step {last_step(workdir)}" + (f" in the save of {cut[0]}" if cut else "")


def run(
    experiment: Path, workdir: Path, flags: Sequence[str], kills: Sequence[Kill], meshes: Sequence[tuple[int, int, int]]
) -> Outcome:
    """Start, kill and restart a run until it is done; each start uses the next of `meshes`, in turn.

    Raises:
        RuntimeError: a start ends with an error.
    """
    outcome, left = Outcome([], [], []), list(kills)
    while True:
        mesh = meshes[len(outcome.meshes) % len(meshes)]
        outcome.meshes.append(mesh)
        process = start(experiment, workdir, flags, mesh)
        killed = kill_at(process, workdir, left.pop(0)) if left else None
        code = process.wait(PATIENCE)
        if killed is not None:
            outcome.kills.append(killed)
            continue
        text = log(workdir).read_text(encoding="utf-8")
        if code:
            raise RuntimeError(f"{workdir}: exit code {code}: {text[-2000:]}")
        outcome.damaged += [line for line in text.splitlines() if "damaged" in line or "skipped:" in line]
        return outcome


def events(workdir: Path) -> dict[tuple[str, int], dict[str, Any]]:
    """Read the train events and evaluations, without values that depend on the clock.

    Raises:
        ValueError: a step has two events of the same kind.
    """
    found: dict[tuple[str, int], dict[str, Any]] = {}
    for event in map(json.loads, (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()):
        if event["event"] in ("train", "evaluation"):
            key = event["event"], event["step"]
            if key in found:
                raise ValueError(f"{workdir} has two of {key}")
            found[key] = {name: value for name, value in event.items() if name not in CLOCK}
    return found


def difference(run: Path, whole: Path) -> float:
    """Return the largest relative difference of a loss from the uninterrupted run's; infinite if events differ."""
    ours, theirs = events(run), events(whole)
    if ours.keys() != theirs.keys():
        return float("inf")
    return max(
        abs(event[name] - theirs[key][name]) / abs(theirs[key][name])
        for key, event in ours.items()
        for name in event
        if name.startswith("loss") and name != "loss_scale"
    )


def draw_kills(draw: random.Random, steps: int, count: int) -> list[Kill]:
    """Draw moments in order: one in a save, each of the others at the start, at a step or in a save."""
    places = sorted(draw.sample(range(1, steps - 4), count))
    kinds = ["save", *draw.choices(("start", "step", "save"), k=count - 1)]
    draw.shuffle(kinds)
    delays = {"start": 6.0, "step": 0.3, "save": 0.02}
    return [Kill(kind, draw.random() * delays[kind], place) for kind, place in zip(kinds, places, strict=True)]


def main() -> int:
    """Run the proof, print a line for each run, and return the exit code."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=int, default=20)
    parser.add_argument("--kills", type=int, default=3, help="the most kills of a run")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    flags = ["--config.train.steps=50", "--config.train.eval_every=10", "--config.train.eval_rows=8"]
    with tempfile.TemporaryDirectory() as name, concurrent.futures.ThreadPoolExecutor(options.workers) as pool:
        folder = Path(name)
        experiment, whole = write_experiment(folder), folder / "whole"
        run(experiment, whole, flags, [], [ONE])
        plans = []
        for number in range(options.runs):
            draw = random.Random(f"{options.seed} {number}")
            meshes = [ONE] if number % 2 == 0 else draw.sample(MESHES, len(MESHES))
            plans.append((folder / f"run_{number}", draw_kills(draw, 50, draw.randint(1, options.kills)), meshes))
        futures = [pool.submit(run, experiment, workdir, flags, kills, meshes) for workdir, kills, meshes in plans]
        good = in_saves = 0
        for number, ((workdir, _, meshes), future) in enumerate(zip(plans, futures, strict=True)):
            outcome = future.result()
            gap = difference(workdir, whole)
            same = events(workdir) == events(whole) if meshes == [ONE] else gap <= TOLERANCE
            good += same and not outcome.damaged
            in_saves += sum("save" in kill for kill in outcome.kills)
            shapes = " ".join("x".join(map(str, mesh)) for mesh in outcome.meshes)
            print(f"run {number:2}: {'same' if same else 'DIFFERS'}, killed at {'; '.join(outcome.kills)}; meshes "
                  f"{shapes}; largest difference {gap:.1e}", *outcome.damaged, flush=True)  # fmt: skip
    print(f"{good} of {options.runs} runs as the uninterrupted one; {in_saves} kills left a save cut off")
    return 0 if good == options.runs and in_saves else 1


if __name__ == "__main__":
    sys.exit(main())
