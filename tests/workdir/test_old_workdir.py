"""A workdir of an earlier version opens: `old_workdir.tar.xz` was made before the rooms moved.

The losses of steps 5 and 6 are those of the version that made it.
"""

import json
import os
import tarfile
from pathlib import Path
from typing import Any

import pytest

import glm_jax
from glm_jax.inference import Model

FIXTURE = Path(__file__).parent / "old_workdir.tar.xz"
STEPS = {5: 5.6574415418836805, 6: 5.682714725362843}
HELD_OUT = 5.6910  # after step 6


@pytest.mark.slow
@pytest.mark.oldest
def test_an_old_workdir_is_read_and_resumed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with tarfile.open(FIXTURE) as archive:
        archive.extractall(tmp_path, filter="data")
    monkeypatch.chdir(tmp_path)
    model = Model.open("workdir")
    assert model.config.num_layers == 2 and model.decoder.weights.outer["embedding"]["word"].shape == (320, 8)
    longer: dict[str, Any] = {"train.steps": 6}
    with glm_jax.load("tiny.py", "workdir", **longer) as run:
        assert (run.step, run.samples) == (4, 16)
        assert run.current.optimizer.peak_lr == 5e-3  # the intervention after step 2
        losses = {step.number: step.loss for step in run.steps()}
        assert losses == pytest.approx(STEPS, rel=1e-5)
        assert run.evaluate()["loss"] == pytest.approx(HELD_OUT, abs=1e-4)
    assert "6" in os.listdir("workdir/checkpoints")
    lines = (tmp_path / "workdir" / "interventions.jsonl").read_text().splitlines()
    assert [list(json.loads(line)["changes"]) for line in lines] == [["optimizer.peak_lr"], ["train.steps"]]
