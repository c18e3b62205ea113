"""`glm-jax report` as a user runs it."""

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

Cli = Callable[..., subprocess.CompletedProcess[str]]


def test_report_writes_a_page_or_a_picture_and_says_in_one_line_what_is_missing(glm_jax: Cli, tmp_path: Path) -> None:
    events = [{"event": "train", "step": step, "samples": step, "loss": 3.0 - step} for step in (1, 2)]
    workdir = tmp_path / "run"
    workdir.mkdir()
    (workdir / "metrics.jsonl").write_text("".join(json.dumps(event) + "\n" for event in events), encoding="utf-8")
    done = glm_jax("report", "--workdir", workdir)
    assert done.returncode == 0 and f"written: {workdir / 'report.html'}" in done.stderr, done.stderr
    assert "Training loss" in (workdir / "report.html").read_text(encoding="utf-8")
    done = glm_jax("report", "--workdir", workdir, "--out", tmp_path / "run.png")
    assert done.returncode == 0 and (tmp_path / "run.png").read_bytes().startswith(b"\x89PNG"), done.stderr
    wrong = glm_jax("report", "--workdir", tmp_path / "none")
    assert wrong.returncode == 2 and "none has no metrics.jsonl" in wrong.stderr, wrong.stderr
    assert len(wrong.stderr.splitlines()) == 1
