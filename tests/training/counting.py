"""Stand-ins for what a run works with: they only count, so that a run of ten steps takes milliseconds."""

import json
from collections.abc import Callable
from contextlib import nullcontext
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.config import Experiment
from glm_jax.training import run as running

Reached = Callable[[str, int], None]  # told the phase and its step


def nothing(phase: str, step: int) -> None:
    """Do nothing when a phase is reached."""


SPEED = {"tokens_per_second": 1.0, "mfu": 0.5}


class Counting:
    """Stands in for a Stretch: its state is the number of steps taken, its losses are `losses[step]`, else 2."""

    def __init__(
        self, diary: list[tuple[Any, ...]], config: Experiment, losses: dict[int, float], asks: dict[int, int],
        reached: Reached = nothing,
    ) -> None:  # fmt: skip
        self.diary, self.config, self.losses, self.asks = diary, config, losses, asks
        model = SimpleNamespace(num_parameters=0)
        self.cfg = SimpleNamespace(engine=SimpleNamespace(model=model), loss_scale=None, lora=None)
        self.mesh = SimpleNamespace(shape={})
        self.prepared = SimpleNamespace(digests={}, tokenizer=SimpleNamespace(digest="a"))
        self.meter = SimpleNamespace(
            waiting=nullcontext, count=lambda *_: None, restart=lambda: None, read=lambda: dict(SPEED)
        )
        self.compiled, self.reached = False, reached

    def describe(self, say: Any) -> None:
        pass

    def compile_ahead(self, state: int, rows: int, base: Any = ()) -> None:
        pass

    def batch(self, samples: int, rows: int) -> tuple[int, int]:
        return samples, rows

    def train(
        self, state: int, batch: tuple[int, int], rows: int, chosen: Any, request: int, base: Any = ()
    ) -> tuple[int, dict[str, Any]]:
        assert batch[1] == rows == chosen["batch"]
        step = state + 1
        self.diary.append(("step", step, batch[0]))
        self.reached("step", step)
        loss = self.losses.get(step, 2.0)
        sums = SimpleNamespace(loss=np.array([loss, 0, 0, 0]), targets=np.array([1, 0, 0, 0]))
        norms = {"grad_norm": np.float32(1), "update_norm": np.float32(1), "loss_scale": np.float32(1)}
        scalars = {**norms, "tokens": np.int32(1), "skipped": np.int32(0)}
        asked = np.int32(max(request, self.asks.get(step, 0)))
        return step, {"sums": sums, **scalars, "activation_rms": np.ones(2), "requests": asked}

    def close(self) -> None:
        self.diary.append(("close",))


class Diary:
    """Stands in for the monitor and the checkpoints: records their calls."""

    def __init__(self, diary: list[tuple[Any, ...]], reached: Reached = nothing) -> None:
        self.diary, self.saved, self.reached = diary, {}, reached

    def log(self, event: dict[str, Any]) -> None:
        json.dumps(event)
        if event["event"] != "start":
            self.diary.append((event["event"], event["step"]))

    def say(self, line: str) -> None:
        pass

    def latest_step(self) -> int | None:
        return max(self.saved, default=None)

    def progress(self, steps: int, shown: Any = None) -> None:
        self.diary.append(("bar", steps))

    def rewind(self, step: int) -> None:
        self.diary.append(("rewind", step))

    def events(self) -> list[Any]:
        return []

    def written_step(self) -> int | None:
        return self.latest_step()

    def unsaved(self) -> None:
        pass

    def close(self) -> None:
        self.reached("close", 0)

    def save(self, state: int, run: dict[str, Any]) -> None:
        assert state == run["step"]
        self.reached("save", run["step"])
        self.diary.append(("save", run["step"], run["samples"]))
        self.diary.append(("saved with", run["numbers"]["train.global_batch"]))
        self.diary.append(("band", run["bands"][0][2]))  # the number of values in the loss's band
        self.saved[run["step"]] = SimpleNamespace(items=state, run=run)

    def restore(self, targets: Any, at_most: int | None, make_room: Callable[[], None]) -> Any:
        self.diary.append(("restore", at_most))
        if at_most is not None:
            self.reached("restore", at_most)
        make_room()
        steps = [step for step in self.saved if at_most is None or step <= at_most]
        return self.saved[max(steps)] if steps else None


def without_arrays(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the state of a run be the number of its steps."""
    monkeypatch.setattr(running.states, "at_step", lambda mesh, state, step, samples, *scale: step)
    monkeypatch.setattr(running.states, "create_state", lambda cfg, mesh, load: 0)
    monkeypatch.setattr(running.states, "disk_targets", lambda cfg, mesh: None)
    monkeypatch.setattr(running.states, "to_disk", lambda cfg, mesh, state: state)
    monkeypatch.setattr(running.states, "from_disk", lambda cfg, mesh, items: items)
    monkeypatch.setattr(running, "versions", dict)
