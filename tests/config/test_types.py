"""Pyright finds a misspelt key and a misspelt choice before anything runs."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

RIGHT = """
from glm_jax.config import Experiment
from glm_jax.model import GLMConfig
def read(experiment: Experiment) -> tuple[int, float]: return experiment.model.num_layers, experiment.optimizer.peak_lr
cfg = GLMConfig(2, 32, 2, 48, 64, norm="deepnorm")
"""
WRONG = {
    4: RIGHT.replace("num_layers", "num_layer"),
    5: RIGHT.replace('"deepnorm"', '"deepnrom"'),
}


@pytest.mark.slow
def test_pyright_finds_what_is_misspelt(tmp_path: Path) -> None:
    (tmp_path / "right.py").write_text(RIGHT)
    for line, text in WRONG.items():
        (tmp_path / f"wrong_{line}.py").write_text(text)
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, cwd=Path(__file__).parents[2], capture_output=True, text=True)
    found = json.loads(done.stdout)["generalDiagnostics"]
    places = sorted((Path(one["file"]).name, one["range"]["start"]["line"] + 1) for one in found)
    assert places == [(f"wrong_{line}.py", line) for line in WRONG], found
    assert "num_layer" in str(found) and "deepnrom" in str(found)
