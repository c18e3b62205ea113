"""A run's steps, with a stretch that only counts: what happens at which step, and in what order."""

from contextlib import ExitStack
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.config import default_config, interventions, resolve
from glm_jax.errors import UserError, WorkFailed
from glm_jax.interop.initial import Initial
from glm_jax.training import run as running
from glm_jax.training.observers import Observer, Request, Step
from glm_jax.training.observers.evaluate import Evaluate
from glm_jax.training.observers.health import Health
from glm_jax.training.observers.log import Log
from glm_jax.training.observers.save import Save
from glm_jax.training.observers.spikes import Bands, Spikes
from glm_jax.training.run import Run
from glm_jax.training.stopping import Stop
from glm_jax.workdir.interventions import Record
from tests.training.counting import Counting, Diary, without_arrays


class Watch(Observer):
    """Stands in for the profiler: records when it is called."""

    def __init__(self, diary: list[tuple[Any, ...]]) -> None:
        self.diary = diary

    def before(self, run: Run) -> None:
        self.diary.append(("before", run.step + 1))

    def after(self, step: Step) -> None:
        self.diary.append(("after", step.number))


def scalar(run: Run) -> Any:
    """Stands in for an evaluator, whose values may be of any scalar type."""
    return {"loss": np.float32(2)}


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that runs from a start to the end and returns the diary; keys as in `train__steps=5`."""
    without_arrays(monkeypatch)

    def go(
        start: tuple[int, int] = (0, 0), losses: dict[int, float] | None = None, asks: dict[int, int] | None = None,
        diary: list[tuple[Any, ...]] | None = None, leave: int = 0,
        ready: Any = lambda *_: SimpleNamespace(digests={}), **changes: Any,
    ) -> list[tuple[Any, ...]]:  # fmt: skip
        config = default_config()
        config.train.update(steps=10, global_batch=4, log_every=100, eval_every=0, save_every=100)
        config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
        config = resolve(config)
        diary = [] if diary is None else diary
        book: Any = Diary(diary)
        monkeypatch.setattr(
            running, "Stretch", lambda config, prepared, _: Counting(diary, config, losses or {}, asks or {})
        )
        monkeypatch.setattr(running, "ready", ready)
        made: Any = object.__new__(Run)
        made.config, made.workdir, made._optimizer, made._say = config, tmp_path, None, book.say
        made._initial = Initial(config, book.say)
        made.stretch, made.closing = Counting(diary, config, losses or {}, asks or {}), ExitStack()
        made.record, made.checkpoints, made.monitor = Record(tmp_path, 0), book, book
        made.observers, made.evaluators = (
            [Watch(diary), Spikes(), Health(), Log(), Evaluate(), Save()],
            [lambda run: {"loss": np.float32(2)}],
        )
        made.stopping, made._asked, made._previous, made._closed = False, 0, None, False
        made._stop, made._latest = Stop(), None
        made.saved_at = running.time.monotonic()
        made.state, made.step, made.samples, made.bands, made.saved = start[0], *start, Bands(), start[0] or None
        made.base = ()
        made._until = interventions.next_step(config, made.step, config.train.steps)
        with made:
            for step in made.steps():
                diary.append(("seen", step.number))
                if step.number == leave:
                    break
            if leave:
                diary.extend(("seen", step.number) for step in made.steps())
            made.save()  # a saved step is not saved again
        with pytest.raises(ValueError, match="the run is closed"):
            next(made.steps())
        diary.append(("last", made.current.train.steps))
        diary.append(("ends", made.step, made.samples, made.stopping))
        return diary

    return go


def steps_of(diary: list[tuple[Any, ...]], name: str) -> list[int]:
    return [entry[1] for entry in diary if entry[0] == name]


def test_logs_evaluations_and_saves_come_at_their_multiples_and_at_the_end(run: Any) -> None:
    diary = run(train__log_every=3, train__eval_every=4, train__save_every=5)
    assert steps_of(diary, "step") == list(range(1, 11))
    assert [entry[2] for entry in diary if entry[0] == "step"] == list(range(0, 40, 4))  # each row once
    assert steps_of(diary, "train") == [3, 6, 9, 10]
    assert steps_of(diary, "evaluation") == [0, 4, 8, 10]
    assert [entry for entry in diary if entry[0] == "save"] == [("save", 5, 20), ("save", 10, 40)]
    assert diary[0] == ("evaluation", 0) and diary[-2:] == [("last", 10), ("ends", 10, 40, False)]
    tenth = diary[diary.index(("step", 10, 36)) - 1 :]
    assert [entry[:2] for entry in tenth[:7]] == [
        ("before", 10), ("step", 10), ("after", 10), ("train", 10), ("bar", 1), ("evaluation", 10), ("save", 10)
    ]  # fmt: skip
    assert diary.count(("close",)) == 1 and steps_of(diary, "seen") == list(range(1, 11))


def test_a_run_that_resumes_or_has_no_evaluations_does_not_evaluate_its_start(run: Any) -> None:
    assert steps_of(run(), "evaluation") == [] and steps_of(run(), "save") == [10]
    diary = run(start=(6, 24), train__eval_every=4, train__log_every=5)
    assert steps_of(diary, "step") == [7, 8, 9, 10] and diary[0] == ("before", 7)
    assert steps_of(diary, "evaluation") == [8, 10] and steps_of(diary, "train") == [10]


def test_a_request_is_met_a_step_later_and_saves(run: Any) -> None:
    diary = run(asks={4: Request.STOP})
    assert steps_of(diary, "step") == [1, 2, 3, 4, 5] and diary[-1] == ("ends", 5, 20, True)
    assert steps_of(diary, "save") == [5]
    diary = run(asks={4: Request.SAVE})
    assert steps_of(diary, "save") == [5, 10] and diary[-1] == ("ends", 10, 40, False)
    diary = run(asks={4: Request.SAVE, 5: Request.SAVE})  # the second was already sent when the first was met
    assert steps_of(diary, "save") == [5, 10]
    diary = run(asks={4: Request.STOP}, train__spike__rollbacks=1)  # the run waits for steps that it watches
    assert diary[-1] == ("ends", 4, 16, True)


@pytest.mark.parametrize("asked", [1, 4, 9])
@pytest.mark.parametrize(
    "changes",
    [
        {"train__save_every": 1},
        {"train__save_every": 1, "train__eval_every": 1, "train__log_every": 1},
        {"train__spike__rollbacks": 1, "train__save_every": 1},
        {"interventions": tuple((step, {"optimizer.peak_lr": 1e-3 + step / 1e6}) for step in range(1, 10))},
        {"train__save_every": 2, "train__skip_steps": ((3, 3), (6, 7))},
    ],
)
def test_a_request_to_stop_is_met_whatever_else_happens_at_each_step(run: Any, asked: int, changes: Any) -> None:
    diary = run(asks=dict.fromkeys(range(asked, asked + 2), Request.STOP), **changes)
    taken = steps_of(diary, "step")
    assert len([step for step in taken if step > asked]) <= 1, "at most the step that was under way"
    assert steps_of(diary, "save")[-1] == taken[-1] and diary[-1][1] == taken[-1]


def test_alone_a_request_to_stop_is_met_before_the_next_step(run: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(self: Watch, step: Step) -> None:
        if step.number == 4:
            step.run.stop()

    monkeypatch.setattr(Watch, "after", stop)
    diary = run(train__save_every=1)
    assert steps_of(diary, "step") == [1, 2, 3, 4] and steps_of(diary, "save") == [1, 2, 3, 4]


NAN = float("nan")


def test_a_dead_run_fails_and_saves_nothing_after_the_last_healthy_step(run: Any) -> None:
    for dead_after in (3, 10):
        diary: list[tuple[Any, ...]] = []
        losses = dict.fromkeys(range(5, 30), NAN)
        words = rf"not been finite for {dead_after} steps, since step 5: .*; the newest checkpoint is that of step 4"
        with pytest.raises(WorkFailed, match=words):
            run(diary=diary, losses=losses, train__steps=30, train__save_every=2, train__dead_after=dead_after)
        assert steps_of(diary, "save") == [2, 4]
        assert max(steps_of(diary, "step")) <= 4 + dead_after + 1  # a step is looked at while the next one runs


def test_a_few_steps_that_are_not_finite_postpone_a_save_and_nothing_else(run: Any) -> None:
    diary = run(losses={2: NAN, 3: float("inf"), 6: NAN}, train__save_every=2, train__dead_after=3)
    assert steps_of(diary, "step") == list(range(1, 11)) and steps_of(diary, "save") == [4, 7, 8, 10]


def test_a_run_whose_last_step_is_not_finite_fails_also_if_none_is_counted(run: Any) -> None:
    diary: list[tuple[Any, ...]] = []
    with pytest.raises(WorkFailed, match=r"of step 10 is not finite: .*; nothing is saved"):
        run(diary=diary, losses=dict.fromkeys(range(1, 11), NAN), train__dead_after=0, train__save_every=3)
    assert len(steps_of(diary, "step")) == 10 and steps_of(diary, "save") == []


def test_steps_are_skipped_with_their_data_through_the_last_of_the_range(run: Any) -> None:
    diary = run(train__skip_steps=((3, 5), (9, 40)), train__eval_every=4, train__save_every=4)
    assert [entry[1:] for entry in diary if entry[0] == "step"] == [(1, 0), (2, 4), (6, 20), (7, 24), (8, 28)]
    assert steps_of(diary, "bar") == [1, 1, 3, 1, 1, 1, 2]
    assert steps_of(diary, "evaluation") == [0, 8, 10] and steps_of(diary, "save") == [8, 10]


def test_a_change_takes_effect_with_the_step_after_its_own(run: Any) -> None:
    diary = run(interventions=((4, {"train.global_batch": 8}), (10, {"train.global_batch": 4})))
    assert [entry[2] for entry in diary if entry[0] == "step"] == [0, 4, 8, 12, 16, 24, 32, 40, 48, 56]
    assert diary.index(("close",)) < diary.index(("step", 5, 16)) < diary.index(("save", 10, 64))
    assert steps_of(diary, "saved with") == [8]  # the batch of the last step, not of the next


def test_a_change_that_does_not_fit_costs_no_steps(run: Any) -> None:
    def refuse(*_: Any) -> None:
        raise UserError("no such corpus")

    for start, save_every in ((0, 100), (2, 100), (2, 4)):
        diary: list[tuple[Any, ...]] = []
        with pytest.raises(UserError, match="no such corpus"):
            run(
                start=(start, 4 * start), diary=diary, ready=refuse, interventions=((4, {"data.seed": 7}),),
                train__save_every=save_every,
            )  # fmt: skip
        assert steps_of(diary, "step") == list(range(start + 1, 5)) and steps_of(diary, "save") == [4]


def test_a_change_that_leaves_the_data_alone_does_not_prepare_it_again(run: Any) -> None:
    def refuse(*_: Any) -> None:
        raise AssertionError("the data is prepared again")

    diary = run(interventions=((4, {"optimizer.peak_lr": 2e-3}),), ready=refuse)
    assert steps_of(diary, "step") == list(range(1, 11)) and diary.count(("close",)) == 2


SPIKE = {"train__spike__window": 3, "train__spike__deviations": 1.0}


def test_a_spike_goes_back_to_the_checkpoint_and_skips_the_data(run: Any) -> None:
    diary = run(losses={7: 90.0}, train__save_every=4, train__spike__rollbacks=1, **SPIKE)
    assert steps_of(diary, "step") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert steps_of(diary, "seen") == [1, 2, 3, 4, 5, 6, 8, 9, 10]  # not the one that was undone
    assert ("restore", 6) in diary and ("rewind", 4) in diary and ("bar", 3) in diary
    assert steps_of(diary, "band") == [4, 5, 7]  # of steps 1 to 4, then 8, then 9 and 10
    assert [entry for entry in diary if entry[0] == "save"] == [("save", 4, 16), ("save", 8, 32), ("save", 10, 40)]


def test_a_spike_before_any_checkpoint_goes_back_to_the_start(run: Any) -> None:
    diary = run(losses={5: 90.0}, train__spike__rollbacks=2, **SPIKE)
    assert steps_of(diary, "step") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10] and ("rewind", 0) in diary
    assert ("bar", 5) in diary


def test_used_up_rollbacks_are_reported_once_for_steps_in_a_row(run: Any) -> None:
    losses = {4: 90.0, 5: 91.0, 6: 92.0, 8: 93.0}
    spike = SPIKE | {"train__spike__window": 2}
    diary = run(losses=losses, train__spike__rollbacks=1, train__save_every=2, **spike)
    assert steps_of(diary, "rewind") == [2] and steps_of(diary, "step") == [1, 2, 3, 4, 5, 6, 7, 8, 9, 10]
    assert steps_of(diary, "spike") == [5, 8]
    watched_by_none = run(losses=losses, train__save_every=2, **spike)
    assert steps_of(watched_by_none, "spike") == steps_of(watched_by_none, "rewind") == []


@pytest.mark.parametrize("leave", [4, 10])
def test_a_loop_that_is_left_continues_where_it_was_and_loses_no_step(run: Any, leave: int) -> None:
    diary = run(leave=leave, train__eval_every=5, interventions=((10, {"train.steps": 12}),))
    assert steps_of(diary, "step") == steps_of(diary, "seen") == list(range(1, 13))
    assert steps_of(diary, "save") == [10, 12] and steps_of(diary, "evaluation") == [0, 5, 10, 12]
