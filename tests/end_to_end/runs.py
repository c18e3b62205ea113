"""`glm-jax train` in the test's own process, so that compiled programs are shared."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.cli import main
from tests.proofs import kills

# ml_collections loads experiments by it
in_process = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")


def flags(changes: dict[str, Any]) -> list[str]:
    return [f"--config.{key}={value}" for key, value in changes.items()]


def train(experiment: Path, workdir: Path, changes: dict[str, Any], *more: str) -> None:
    """Train to the last step, from the newest checkpoint."""
    assert main.main(["train", f"--config={experiment}", f"--workdir={workdir}", *flags(changes), *more]) == 0


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def train_events(workdir: Path) -> dict[int, dict[str, Any]]:
    """Return the train events by step, without what depends on the clock."""
    return {step: event for (kind, step), event in kills.events(workdir).items() if kind == "train"}
