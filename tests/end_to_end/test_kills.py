"""A run killed with SIGKILL, once during a save and once before a change of mesh; tests/proofs/kills.py has more."""

from pathlib import Path

import pytest

from tests.proofs import kills
from tests.proofs.kills import ONE, Kill

pytestmark = pytest.mark.slow

FLAGS = ["--config.train.steps=20", "--config.train.eval_every=10", "--config.train.save_every=3"]


def test_a_killed_run_resumes_as_if_nothing_had_happened(experiment: Path, tmp_path: Path) -> None:
    whole, again, elsewhere = tmp_path / "whole", tmp_path / "again", tmp_path / "elsewhere"
    kills.run(experiment, whole, FLAGS, [], [ONE])
    outcome = kills.run(experiment, again, FLAGS, [Kill("save", 0.0, 6)], [ONE])
    assert len(outcome.kills) == 1 and not outcome.damaged
    assert kills.events(again) == kills.events(whole)
    outcome = kills.run(experiment, elsewhere, FLAGS, [Kill("step", 0.0, 11)], [ONE, (2, 1, 1)])
    assert outcome.meshes == [ONE, (2, 1, 1)] and not outcome.damaged
    assert kills.difference(elsewhere, whole) <= kills.TOLERANCE
    for (kind, step), event in kills.events(elsewhere).items():
        if kind == "train":
            assert event["samples"] == 8 * step and event["lr"] == pytest.approx(
                kills.events(whole)[kind, step]["lr"], rel=1e-6
            )
