"""Each observer by itself, with a stand-in for the run; test_run.py tests them together."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config import default_config, resolve
from glm_jax.training.observers import Request, Step
from glm_jax.training.observers.evaluate import Evaluate
from glm_jax.training.observers.log import Log
from glm_jax.training.observers.profile import Profile
from glm_jax.training.observers.save import Save
from glm_jax.training.observers.spikes import Bands, Spikes


def at(step: int, diary: list[Any] | None = None, **changes: Any) -> Any:
    """Return a stand-in for a run after `step` steps; it records in the diary what it is asked to do."""
    config = default_config()
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    told = [] if diary is None else diary
    return SimpleNamespace(
        step=step, current=resolve(config), bands=Bands(), watches_spikes=True, saved_at=0.0,
        stretch=SimpleNamespace(meter=SimpleNamespace(read=lambda: {"tokens_per_second": 5.0, "mfu": 0.5})),
        monitor=SimpleNamespace(progress=lambda steps, shown: told.append(("bar", steps, shown))),
        checkpoints=SimpleNamespace(events=lambda: [{"event": "checkpoint"}]),
        log=lambda event: told.append(("log", event["event"])), say=lambda line: told.append(("say", line)),
        ask=lambda request: told.append(("ask", request)), evaluate=lambda: told.append("evaluate"),
        save=lambda: told.append("save"), go_back=lambda seen: told.append(("back", seen.step, seen.loss)),
    )  # fmt: skip


def taken(
    number: int, metrics: Any = None, run: Any = None, request: Request = Request.NOTHING, loss: float = 2.0
) -> Step:
    sums = SimpleNamespace(loss=np.array([2 * loss, 0, 0, 0]), targets=np.array([2, 0, 0, 0]))
    whole = {"sums": sums, "grad_norm": np.float32(3), "tokens": np.int32(7), "skipped": np.int32(0),
             "update_norm": np.float32(1), "loss_scale": np.float32(8),
             "requests": np.int32(0), "activation_rms": np.ones(2)}  # fmt: skip
    settings = {"embedding_shrink": 1.0, "batch": 4}
    return Step(run or at(number), number, 4 * number, whole | (metrics or {}), settings, request)


def test_the_log_has_every_nth_step_and_the_last_and_the_bar_moves_with_each() -> None:
    diary: list[Any] = []
    run = at(0, diary, train__log_every=3, train__steps=5)
    for number in range(1, 6):
        Log().after(taken(number, run=run))
    assert [entry[0] for entry in diary] == ["bar", "bar", "log", "bar", "bar", "log", "bar"]
    events = [entry[2] for entry in diary if entry[0] == "bar"]
    assert [event and event["step"] for event in events] == [None, None, 3, None, 5]
    assert events[-1]["loss"] == 2.0 and events[-1]["tokens_per_second"] == 5.0


def test_a_steps_event_has_its_losses_metrics_and_settings() -> None:
    event = taken(3).event()
    assert event["event"] == "train" and (event["step"], event["samples"]) == (3, 12)
    assert event["loss"] == event["loss/mask"] == 2.0 and "loss/gmask" not in event
    assert event["grad_norm"] == 3.0 and event["tokens"] == 7 and "requests" not in event
    assert event["activation_rms"] == [1.0, 1.0] and event["batch"] == 4 and taken(3).loss == 2.0


def test_compiling_is_said_once_a_stretch() -> None:
    diary: list[Any] = []
    run = at(0, diary)
    run.stretch.compiled = False
    log = Log()
    log.before(run)
    log.before(run)
    assert diary == [("say", "compiling the training step")]


@pytest.mark.parametrize(
    "metrics, precision, healthy",
    [
        ({}, "float32", True),
        ({"grad_norm": np.float32("nan")}, "float32", False),
        ({"grad_norm": np.float32("inf")}, "bfloat16", False),
        ({"update_norm": np.float32("nan")}, "float32", False),  # of an optimizer that divides 0 by 0
        ({"grad_norm": np.float32("inf")}, "float16", True),  # the loss scale halves
        ({"grad_norm": np.float32("inf"), "loss_scale": np.float32(1)}, "float16", False),
    ],
)
def test_a_step_is_healthy_while_it_is_finite_or_its_loss_scale_falls(
    metrics: Any, precision: str, healthy: bool
) -> None:
    assert taken(3, metrics, at(3, train__precision=precision)).is_healthy() == healthy


def test_a_step_whose_loss_is_not_finite_is_not_healthy() -> None:
    assert not taken(3, loss=float("nan")).is_healthy() and not taken(3, loss=float("inf")).is_healthy()


def test_evaluations_come_every_nth_step_and_after_the_last_unless_disabled() -> None:
    for every, expected in ((2, [2, 4, 5]), (0, [])):
        diary: list[Any] = []
        run, due = at(0, diary, train__eval_every=every, train__steps=5), []
        for number in range(1, 6):
            Evaluate().after(taken(number, run=run))
            due += [number] * len(diary)
            diary.clear()
        assert due == expected


def test_saves_come_by_steps_by_request_and_by_the_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    diary: list[Any] = []
    run = at(0, diary, train__save_every=4, train__save_minutes=2.0)
    for number, request, saved in ((3, Request.NOTHING, 0), (4, Request.NOTHING, 1), (5, Request.SAVE, 1)):
        diary.clear()
        Save().after(taken(number, run=run, request=request))
        assert diary == [("log", "checkpoint")] + ["save"] * saved
    diary.clear()
    for passed, asked in ((119.0, []), (121.0, [("ask", Request.SAVE)])):
        monkeypatch.setattr("time.monotonic", lambda passed=passed: passed)
        Save().before(run)
        assert diary == asked


def test_spikes_go_back_while_rollbacks_are_left_then_are_reported_once_in_a_row() -> None:
    def watch(losses: list[float], rollbacks: int) -> list[Any]:
        diary: list[Any] = []
        run = at(0, diary, train__spike__rollbacks=rollbacks, train__spike__window=2, train__spike__deviations=1.0)
        spikes = Spikes()
        for number, loss in enumerate(losses, 1):
            spikes.after(taken(number, run=run, loss=loss))
        return diary

    losses = [2.0, 2.0, 90.0, 91.0, 2.0, 92.0]
    assert watch(losses, 1) == [("back", 3, 90.0), ("back", 4, 91.0), ("back", 6, 92.0)]
    said = watch(losses, 0)
    assert [entry[0] for entry in said] == ["log", "say"] * 2
    assert "spike at step 3" in said[1][1] and "spike at step 6" in said[3][1] and "used up" in said[1][1]


@pytest.mark.parametrize("first", [1, 3])
def test_the_profile_traces_the_requested_steps(tmp_path: Path, first: int) -> None:
    profile = Profile(tmp_path, (2, 3))
    double = jax.jit(lambda x: 2 * x)
    running = {}
    for step in range(first, 6):
        profile.before(at(step - 1))
        running[step] = profile._tracing
        profile.after(taken(step, {"loss": double(jnp.ones(2))}))
    assert running == {step: step in (2, 3) for step in range(first, 6)}
    assert list((tmp_path / "profile").rglob("*.xplane.pb"))
    profile.close()


def test_a_run_that_stops_early_ends_its_trace_and_one_without_steps_has_none(tmp_path: Path) -> None:
    profile = Profile(tmp_path / "traced", (1, 9))
    profile.before(at(0))
    profile.close()
    assert list((tmp_path / "traced").rglob("*.xplane.pb"))
    silent = Profile(tmp_path / "silent", ())
    silent.before(at(0))
    silent.after(taken(1))
    silent.close()
    assert not (tmp_path / "silent").exists()
