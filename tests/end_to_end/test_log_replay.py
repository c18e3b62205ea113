"""A small copy of GLM-130B's training log: one run, changed at each of the log's incidents, against values by hand.

Incidents in 2022: 6 May start, 7 May node failure, 10 May shrink, 29 May mixture ramp with a warm
restart, 3 June learning rate halved, 12 and 14 June shrink, 20 and 22 June data skipped.
"""

import json
import math
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.rows import Rows
from glm_jax.training.stretch import Stretch
from tests.end_to_end.runs import flags, in_process, lines, train, train_events
from tests.proofs import kills
from tests.proofs.kills import ONE, Kill

pytestmark = pytest.mark.slow

MASK, GMASK = OBJECTIVES.index("mask"), OBJECTIVES.index("gmask")
ROWS = 8  # a step
BEFORE, AFTER = {"gmask": 1.0, "mask": 0.0}, {"gmask": 0.5, "mask": 0.5}
RAMP = ((0, BEFORE), (160, BEFORE), (224, AFTER))
ENGLISH = {"en": 1.0, "zh": 0.0}
SOURCES = ((0, ENGLISH), (160, ENGLISH), (224, {"en": 0.5, "zh": 0.5}))

# Each incident: the steps up to the next one, and what its command changes.
START = {
    "train.steps": 10,
    "train.eval_every": 0,
    "train.save_every": 4,
    "train.embedding_shrink.alpha": 0.1,
    "data.blanks.history": RAMP[:1],
    "data.weights": SOURCES[:1],
    "optimizer.peak_lr": 1e-2,
    "optimizer.min_lr": 1e-3,
    "optimizer.warmup_samples": 32,
    "optimizer.decay_samples": 400,
}
SHRINK_RAMP = {"train.steps": 20, "train.embedding_shrink.history": ((12, 0.1), (16, 1.0))}
MIXTURE_RAMP = {
    "train.steps": 28,
    "data.blanks.history": RAMP,
    "data.weights": SOURCES,
    "optimizer.rewarm": ((20, 4),),
    "train.embedding_shrink.history": ((20, 0.2), (26, 1.0)),
}
HALVED = {"train.steps": 34, "optimizer.peak_lr": 5e-3, "optimizer.min_lr": 5e-4}
DROPPED = {"train.steps": 38, "train.embedding_shrink.history": (), "train.embedding_shrink.alpha": 0.5}
SKIPPED = {"train.steps": 50, "train.embedding_shrink.alpha": 0.1, "train.skip_steps": ((41, 43), (46, 46))}

SHRINKS = [0.1] * 12 + [0.325, 0.55, 0.775] + [1.0] * 5 + [0.2 + 0.8 * k / 6 for k in range(1, 7)] + [1.0] * 8
SHRINKS += [0.5] * 4 + [0.1] * 12


def lr(step: int) -> float:
    """Return the rate by hand: 4 steps of warm-up, a cosine to step 50, 4 more after step 20, halved after step 28."""
    if step <= 4:
        return 1e-2 * step / 4
    cosine = (1 + math.cos(math.pi * (step - 4) / 46)) / 2
    if step > 28:
        return 5e-4 + 4.5e-3 * cosine
    return (1e-3 + 9e-3 * cosine) * {21: 0.25, 22: 0.5, 23: 0.75}.get(step, 1)


class Batches:
    """The batches of a run by step, recorded as its stretches hand them out."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.given: dict[int, tuple[np.ndarray, Rows[np.ndarray]]] = {}
        hand_out = Stretch.batch

        def batch(part: Stretch, samples: int, rows: int) -> Any:
            given = hand_out(part, samples, rows)
            assert rows == ROWS
            labels = np.zeros((2, len(OBJECTIVES)), int)  # rows by source and objective
            np.add.at(labels, (given.source.ravel(), given.objective.ravel()), 1)
            self.given[samples // ROWS + 1] = labels, given
            expected = part.batches.at(samples, ROWS)
            for array, wanted in zip(given, expected, strict=True):
                np.testing.assert_array_equal(array.reshape(wanted.shape), wanted)
            return given

        monkeypatch.setattr(Stretch, "batch", batch)

    def rows(self, first: int, last: int) -> list[int]:
        """Return the rows of some steps: English [MASK] and [gMASK], Chinese [MASK] and [gMASK]."""
        total = np.sum([self.given[step][0] for step in range(first, last + 1)], axis=0)
        assert total.sum() == ROWS * (last - first + 1)
        return [int(total[source, kind]) for source in (0, 1) for kind in (MASK, GMASK)]


def replay_the_log(experiment: Path, workdir: Path) -> None:
    """Follow the log: resume at each incident with the operator's flags, and keep those of earlier incidents."""
    changes = dict(START)
    train(experiment, workdir, changes)
    changes |= SHRINK_RAMP
    outcome = kills.run(experiment, workdir, flags(changes), [Kill("step", 0.0, 14)], [ONE])  # and resumed
    assert len(outcome.kills) == 1 and not outcome.damaged
    for incident in (MIXTURE_RAMP, HALVED, DROPPED, SKIPPED):
        changes |= incident
        train(experiment, workdir, changes)


def check_record(workdir: Path, cause: str) -> None:
    """Check interventions.jsonl against the list of what the commands changed."""
    before = {
        "data.blanks.history": [[0, BEFORE]],
        "data.weights": [[0, ENGLISH]],
        "optimizer.peak_lr": 1e-2,
        "optimizer.min_lr": 1e-3,
        "optimizer.rewarm": [],
        "train.embedding_shrink.alpha": 0.1,
        "train.embedding_shrink.history": [],
        "train.skip_steps": [],
        "train.steps": 10,
    }
    expected = []
    for step, changes in ((10, SHRINK_RAMP), (20, MIXTURE_RAMP), (28, HALVED), (34, DROPPED), (38, SKIPPED)):
        after = json.loads(json.dumps(changes))
        changed = {key: [before[key], value] for key, value in after.items()}
        expected.append(
            {"event": "intervention", "step": step, "samples": ROWS * step, "cause": cause, "changes": changed}
        )
        before |= after
    assert lines(workdir / "interventions.jsonl") == expected


@in_process
def test_the_log_in_small_and_its_replay(experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, again = tmp_path / "run", tmp_path / "again"
    replay_the_log(experiment, run)
    trained = train_events(run)
    taken = [step for step in range(1, 51) if step not in (41, 42, 43, 46)]
    assert list(trained) == taken and not (run / "checkpoints" / "40.damaged").exists()
    for step, event in trained.items():
        assert event["lr"] == pytest.approx(lr(step), rel=1e-6)
        assert event["embedding_shrink"] == pytest.approx(SHRINKS[step - 1], rel=1e-12)
        assert (event["samples"], event["batch"]) == (ROWS * step, ROWS)
        assert ("loss/mask" in event) == (step > 20) and "loss/gmask" in event
    check_record(run, "config")

    batches = Batches(monkeypatch)
    train(experiment, again, START, f"--replay={run / 'interventions.jsonl'}")
    assert kills.events(again) == kills.events(run)
    check_record(again, "planned")
    assert list(batches.given) == taken
    assert batches.rows(1, 20) == [0, 160, 0, 0]
    for first in (21, 23, 25, 27):  # the ramp's only step: a quarter [MASK], a quarter Chinese
        assert batches.rows(first, first + 1) == [3, 9, 1, 3]
    for step in taken[28:]:
        assert batches.rows(step, step) == [2, 2, 2, 2]
    for step, event in trained.items():
        assert event["tokens"] == (batches.given[step][1].segments > 0).sum()


# A rate that wrecks the model for one step, twice; the band is wide, as the loss of a tiny model is uneven.
SPIKES = {
    "train.steps": 26,
    "train.eval_every": 6,
    "train.save_every": 4,
    "train.spike.rollbacks": 1,
    "train.spike.window": 5,
    "train.spike.deviations": 20.0,
    "optimizer.decay_samples": 400,
    "interventions": (
        (10, {"optimizer.peak_lr": 50.0}),
        (11, {"optimizer.peak_lr": 0.01}),
        (20, {"optimizer.peak_lr": 50.0}),
        (21, {"optimizer.peak_lr": 0.01}),
    ),
}


@in_process
def test_a_spike_is_rolled_back_once(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run, killed = tmp_path / "run", tmp_path / "killed"
    train(experiment, run, SPIKES)
    said = capsys.readouterr().err
    spike, wrecked, fixed = lines(run / "interventions.jsonl")
    assert {key: spike[key] for key in ("step", "samples", "cause", "changes", "skipped")} == {
        "step": 8,
        "samples": 64,
        "cause": "spike",
        "changes": {"train.skip_steps": [[], [[9, 12]]], "train.spike.rollbacks": [1, 0]},
        "skipped": [9, 12],
    }
    assert spike["seen"]["step"] == 12 and spike["seen"]["loss"] > 20 and "above its band" in spike["seen"]["reason"]
    assert [(line["step"], line["cause"]) for line in (wrecked, fixed)] == [(20, "planned"), (21, "planned")]
    assert "going back to step 8" in said and "(1 of 1 times)" in said
    assert list(train_events(run)) == [*range(1, 9), *range(13, 27)]
    evaluated = [step for kind, step in kills.events(run) if kind == "evaluation"]
    assert evaluated == [0, 6, 18, 24, 26]
    # the second one is reported once, and not rolled back
    (second,) = (event for event in lines(run / "metrics.jsonl") if event["event"] == "spike")
    assert second["step"] == 22 and second["loss"] > 20 and "train.spike.rollbacks are used up" in said
    assert said.count("spike at step") == 2

    process, record = kills.start(experiment, killed, flags(SPIKES), ONE), killed / "interventions.jsonl"
    while process.poll() is None and not (record.exists() and "spike" in record.read_text(encoding="utf-8")):
        time.sleep(0.002)
    process.kill()
    assert process.wait() == -9
    capsys.readouterr()
    train(experiment, killed, SPIKES)
    said = capsys.readouterr().err
    assert "resuming from step 8" in said and said.count("spike at step") == 1  # the first does not occur again
    assert kills.events(killed) == kills.events(run)
    assert lines(record) == lines(run / "interventions.jsonl")

    again = tmp_path / "again"
    changes = {key: value for key, value in SPIKES.items() if key != "interventions"}
    train(experiment, again, changes, f"--replay={run / 'interventions.jsonl'}")
    assert kills.events(again) == kills.events(run)
    assert [line["changes"] for line in lines(again / "interventions.jsonl")] == [
        line["changes"] for line in (spike, wrecked, fixed)
    ]


@in_process
def test_a_run_whose_last_steps_are_skipped_is_evaluated_and_saved_at_its_end(experiment: Path, tmp_path: Path) -> None:
    planned = ((2, {"train.precision": "float16", "train.loss_scale.initial": 1024.0}),)
    changes = {"train.steps": 5, "train.skip_steps": ((4, 9),), "train.eval_every": 5, "interventions": planned}
    train(experiment, tmp_path, changes)
    assert list(kills.events(tmp_path)) == [
        ("evaluation", 0), ("train", 1), ("train", 2), ("train", 3), ("evaluation", 5)
    ]  # fmt: skip
    assert [event["loss_scale"] for event in train_events(tmp_path).values()] == [1, 1, 1024]
    assert (tmp_path / "checkpoints" / "5").is_dir()
