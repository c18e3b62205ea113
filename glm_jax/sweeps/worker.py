"""One process of a sweep: train a group, given as JSON on standard input, and write its members' results.

    python -m glm_jax.sweeps.worker < group.json

Each step done is a line on standard output; when nobody reads it any more, the process ends.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import sys
import time
from pathlib import Path

from glm_jax import startup
from glm_jax.config import Experiment, recipe, resolve
from glm_jax.errors import UserError
from glm_jax.sweeps import group
from glm_jax.sweeps import verdict as sweep_verdict
from glm_jax.sweeps.group import Outcome
from glm_jax.sweeps.results import UNFINISHED, Row, number, save_member
from glm_jax.sweeps.unfinished import Unfinished
from glm_jax.types import Json


def work(job: Json) -> None:
    """Train the group of a job and write its members' results."""
    started = time.monotonic()
    resolved = [resolve(member["config"]) for member in job["members"]]
    prepared = group.prepare_all(resolved, lambda line: print(line, file=sys.stderr, flush=True))
    workdir = Path(job["workdir"])
    digest = hashlib.sha256(json.dumps(job["members"], sort_keys=True).encode()).hexdigest()
    unfinished = Unfinished(workdir / UNFINISHED / f"{job['group'].replace(' ', '-')}.npz", digest)
    outcomes = group.train(resolved, prepared, lambda step: print(step, flush=True), unfinished)
    run = {"group": job["group"], "members": len(resolved), "seconds": round(time.monotonic() - started, 1)}
    for member, config, outcome in zip(job["members"], resolved, outcomes, strict=True):
        named = {key: member[key] for key in ("name", "labels", "changes")}
        save_member(workdir, {**named, **result(config, outcome), "run": run})
    unfinished.remove()


def result(config: Experiment, outcome: Outcome) -> Row:
    """Return an outcome as it is saved; the verdict judges the saved numbers."""
    losses = [number(loss) for loss in outcome.losses]
    saved = [float("nan") if loss is None else loss for loss in losses]
    smooth, warmup = sweep_verdict.smooth(saved), math.ceil(config.optimizer.warmup_samples / config.train.global_batch)
    uniform, unigram = float(f"{outcome.uniform:.9g}"), float(f"{outcome.unigram:.9g}")
    verdict = sweep_verdict.judge(saved, warmup, uniform, unigram)
    metrics = {name: [number(value) for value in values] for name, values in outcome.metrics.items()}
    stairs = config.optimizer.stairs
    broke: Row = {}
    if stairs:
        broke["broke"] = _broke(config, sweep_verdict.breaks(saved, stairs[0]))
        broke["loss_before_stairs"] = number(smooth[stairs[0] - 1])
    return {
        "status": verdict.status,
        "step": verdict.step,
        "reason": verdict.reason,
        "loss": number(smooth[-1]),
        "heldout": {name: number(value) for name, value in outcome.heldout.items()},
        "skipped": outcome.skipped,
        "warmup": warmup,
        "uniform": uniform,
        "unigram": unigram,
        **broke,
        "curves": {"loss": losses, "step": [int(step) for step in outcome.steps], **metrics},
    }


def _broke(config: Experiment, step: int | None) -> Json | None:
    """Return the step at which a member broke on its stairs and the rate of that step; None if it did not break."""
    if step is None:
        return None
    return {"step": step, "lr": number(recipe.learning_rate(config, step, step * config.train.global_batch))}


def main() -> int:
    """Do the job given on standard input, and return the exit code."""
    startup.prepare()
    try:
        work(json.load(sys.stdin))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except BrokenPipeError:  # the sweep is gone; when it resumes, so does this group
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
