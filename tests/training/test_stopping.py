"""A request to stop: every setting, at every moment of a run, by every signal. The run only counts its steps."""

import os
import signal
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax import signals
from glm_jax.cli import train
from glm_jax.config import Experiment, default_config, resolve
from glm_jax.signals import ENDING
from glm_jax.training import run as running
from glm_jax.training.observers import Observer, Step
from glm_jax.training.run import Run
from glm_jax.workdir.interventions import Record
from tests.training.counting import Counting, Diary, without_arrays

INT, TERM, HUP, USR1 = ENDING
STEPS = 8
SPIKE = 6  # the step whose loss is one, where the run watches

# The last of several signals in a row; Ctrl-C twice is another request, see below.
REQUESTS = [(INT,), (TERM,), (HUP,), (USR1,), (TERM, TERM), (USR1, TERM, TERM), (INT, TERM, HUP), (HUP, USR1, TERM)]

SETTINGS: dict[str, dict[str, Any]] = {
    "defaults": {},
    "save at every step": {"train.save_every": 1, "train.keep": 1},
    "save and log at every third": {"train.save_every": 3, "train.log_every": 3},
    "evaluate at every step": {"train.eval_every": 1, "train.log_every": 1},
    "evaluate and save": {"train.eval_every": 2, "train.save_every": 2, "train.keep": 1},
    "skip steps": {"train.skip_steps": ((3, 3), (6, 7)), "train.save_every": 2},
    "skip the last steps": {"train.skip_steps": ((7, 8),), "train.eval_every": 4},
    "roll back": {"train.spike.rollbacks": 1, "train.save_every": 1, "train.eval_every": 3},
    "roll back to the start": {"train.spike.rollbacks": 1},
    "change a rate": {"interventions": ((4, {"optimizer.peak_lr": 2e-3}), (5, {"optimizer.peak_lr": 3e-3}))},
    "change the data": {
        "interventions": ((3, {"data.seed": 5}), (6, {"data.seed": 6, "train.global_batch": 8})), "train.save_every": 2,
    },
    "change the data, roll back": {
        "interventions": ((4, {"data.seed": 5}),), "train.spike.rollbacks": 1, "train.save_every": 3, "train.keep": 1,
    },
    "change the last step": {"interventions": ((4, {"train.steps": 6}),), "train.save_every": 4},
}  # fmt: skip


class Left(BaseException):
    """Takes the place of the end of the process."""


class Everywhere(Observer):
    """Counts as a phase of its own, before and after a step; the last observer of a run."""

    def __init__(self, reached: Any) -> None:
        self.reached = reached

    def before(self, run: Run) -> None:
        self.reached("before", run.step + 1)

    def after(self, step: Step) -> None:
        self.reached("after", step.number)


class Start:
    """One start of the command on a workdir, with the signals that it gets at one moment.

    Args:
        book: stands for the checkpoints on the disk.
        moment: the number of the phase, of all that are reached, at which the signals come; None for no signal. Those
            that follow an interruption come at the phase that is reached next.
    """

    def __init__(
        self, monkeypatch: pytest.MonkeyPatch, config: Experiment, workdir: Path, book: Diary,
        moment: int | None = None, numbers: tuple[int, ...] = (), ready: Any = None,
    ) -> None:  # fmt: skip
        self.phases: list[tuple[str, int]] = []
        self.moment, self.numbers = moment, list(numbers)
        self.said: list[str] = []
        self.rows: dict[int, tuple[Any, ...]] = {}
        self.run: Run | None = None
        diary: list[tuple[Any, ...]] = []
        book.diary, book.reached = diary, self.reached
        losses = {step: 2 + step / 100 for step in range(STEPS + 1)} | {SPIKE: 90.0}

        def prepare(config: Experiment, *_: Any) -> Any:
            if self.run is not None:  # the first is before training begins
                self.reached("prepare", self.run.step)
            return SimpleNamespace(digests={}, tokenizer=SimpleNamespace(digest="a"))

        def part(config: Experiment, prepared: Any, _: Any) -> Counting:
            return Counting(diary, config, losses, {}, self.reached)

        monkeypatch.setattr(running, "ready", ready or prepare)
        monkeypatch.setattr(running, "Stretch", part)
        monkeypatch.setattr(running, "Checkpoints", lambda *_: book)
        monkeypatch.setattr(running.folder, "identity", lambda *_: {})
        monkeypatch.setattr(running.folder, "write", lambda *_: None)
        monkeypatch.setattr(Run, "monitor", book)
        monkeypatch.setattr(Run, "say", lambda _, line: self.said.append(line))
        monkeypatch.setattr(signals, "leave", self.leave)
        self.code = self.command(config, workdir)
        steps = [entry for entry in diary if entry[0] == "step"]
        self.taken = {step: samples for _, step, samples in steps}

    def leave(self) -> None:
        raise Left

    def reached(self, phase: str, step: int) -> None:
        self.phases.append((phase, step))
        while self.moment is not None and self.moment < len(self.phases) and self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))

    def command(self, config: Experiment, workdir: Path) -> int:
        """Do what `glm-jax train` does."""
        try:
            with signals.handled(signals.Interrupt()):
                self.run = run = Run(config, workdir, self.said.append)
                run.observers.append(Everywhere(self.reached))
                run.evaluators = [self.evaluate]
                return train.go(run, lambda: self.reached("afterwards", run.step))
        except KeyboardInterrupt:
            return signals.INTERRUPTED
        except Left:
            return -1

    def evaluate(self, run: Run) -> Any:
        self.reached("evaluation", run.step)
        return {"loss": np.float32(2)}


def experiment(changes: dict[str, Any]) -> Experiment:
    config = default_config()
    config.train.update(steps=STEPS, global_batch=4, log_every=100, eval_every=0, save_every=100)
    config.train.spike.update(window=3, deviations=3.0)
    config.update_from_flattened_dict(changes)
    return resolve(config)


@pytest.fixture
def start(monkeypatch: pytest.MonkeyPatch) -> Any:
    without_arrays(monkeypatch)

    def begin(config: Experiment, workdir: Path, book: Diary | None = None, **more: Any) -> Start:
        workdir.mkdir(exist_ok=True)
        return Start(monkeypatch, config, workdir, Diary([]) if book is None else book, **more)

    return begin


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """No signal is ignored, as it would be under nohup, and all handlers return."""
    found = [signal.signal(number, signal.default_int_handler) for number in ENDING]
    yield
    assert all(signal.getsignal(number) is signal.default_int_handler for number in ENDING)
    for number, handler in zip(ENDING, found, strict=True):
        signal.signal(number, handler)


@pytest.mark.parametrize("setting", SETTINGS)
def test_a_request_is_met_within_a_step_and_the_run_resumes_as_if_there_was_none(
    setting: str, start: Any, tmp_path: Path
) -> None:
    changes = SETTINGS[setting]
    kept = Diary([])
    config = experiment(changes)
    whole = start(config, tmp_path / "whole", kept)
    assert whole.code == train.DONE
    last = kept.latest_step()
    assert whole.phases[-1] == ("afterwards", last)
    recorded = Record(tmp_path / "whole", STEPS).lines
    for moment, (phase, step) in enumerate(whole.phases):
        numbers = REQUESTS[moment % len(REQUESTS)]
        case = f"{setting}: {[signal.Signals(number).name for number in numbers]} at {phase} {step}"
        book, workdir = Diary([]), tmp_path / f"run{moment}"
        asked = start(config, workdir, book, moment=moment, numbers=numbers)
        if phase == "afterwards":
            assert asked.code == signals.INTERRUPTED, case
            continue
        saved = book.latest_step()
        assert saved is not None, case
        if saved == last:
            assert asked.code == train.DONE and ("afterwards", last) not in asked.phases, case
        else:
            assert asked.code == train.STOPPED, case
            assert asked.said[-1].startswith(f"stopped: step {saved} is saved in {workdir}; the same command"), case
        begun = [at for kind, at in asked.phases[moment + 1 :] if kind == "step"]
        assert len(begun) <= (phase in ("before", "prepare")), case  # the step that is being prepared is taken
        resumed = start(config, workdir, book)
        assert resumed.code == train.DONE and book.latest_step() == last, case
        if ("restore", SPIKE - 1) in whole.phases[moment:] and changes.get("train.save_every") != 1:
            continue  # it goes back to the step that the request has saved
        assert book.saved[last].run == kept.saved[last].run, case
        assert {**asked.taken, **resumed.taken} == whole.taken, case
        assert Record(workdir, STEPS).lines == recorded, case


@pytest.mark.parametrize("phase", ["step", "save", "evaluation", "after"])
def test_the_second_ctrl_c_interrupts_and_the_third_ends_the_process(phase: str, start: Any, tmp_path: Path) -> None:
    config = experiment({"train.save_every": 2, "train.eval_every": 2})
    phases = start(config, tmp_path / "whole").phases
    moment = phases.index((phase, 4))
    for numbers, code in (((INT, INT), signals.INTERRUPTED), ((TERM, INT), signals.INTERRUPTED), ((INT,) * 3, -1)):
        book = Diary([])
        asked = start(config, tmp_path / f"run{len(numbers)}", book, moment=moment, numbers=numbers)
        assert asked.code == code and book.latest_step() == (4 if phase == "after" else 2), numbers


def test_before_training_the_first_signal_interrupts_and_nothing_is_written(start: Any, tmp_path: Path) -> None:
    for number in ENDING:

        def prepare(*_: Any, number: int = number) -> None:
            os.kill(os.getpid(), number)

        asked = start(experiment({}), tmp_path / "run", ready=prepare)
        assert asked.code == signals.INTERRUPTED and asked.phases == [] and not list((tmp_path / "run").iterdir())


@pytest.mark.parametrize("number", ENDING)
def test_the_first_signal_asks_and_the_old_handlers_return(number: int) -> None:
    asked: list[str] = []
    found = signal.signal(number, signal.default_int_handler)  # SIGHUP may be ignored, as under nohup
    try:
        before = [signal.getsignal(one) for one in ENDING]
        with pytest.raises(KeyboardInterrupt), signals.listening(lambda: asked.append("stop")):
            os.kill(os.getpid(), number)
            assert asked == ["stop"]
            os.kill(os.getpid(), signal.SIGINT)  # after the first signal it interrupts
        assert [signal.getsignal(one) for one in ENDING] == before and asked == ["stop"]
    finally:
        signal.signal(number, found)


def test_a_signal_that_is_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with signals.listening(lambda: pytest.fail("it was heard")):
            os.kill(os.getpid(), signal.SIGHUP)
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_signal_while_the_last_step_is_written_does_not_lose_it(start: Any, tmp_path: Path) -> None:
    config, book = experiment({}), Diary([])
    whole = start(config, tmp_path / "whole")
    asked = start(config, tmp_path / "run", book, moment=whole.phases.index(("close", 0)), numbers=(TERM,))
    assert asked.code == train.DONE and book.latest_step() == STEPS and asked.said[-1:] == whole.said[-1:]


def test_ctrl_c_in_a_loop_of_ones_own_waits_for_the_observers_and_the_loop_continues(tmp_path: Path) -> None:
    seen: list[str] = []
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), INT)
        seen.append("the step and its observers")
    assert seen == ["the step and its observers"]
    with pytest.raises(KeyboardInterrupt), signals.deferred():
        os.kill(os.getpid(), INT)
        os.kill(os.getpid(), INT)  # nobody wants to wait
        seen.append("never")
    with pytest.raises(ValueError, match="of its own"), signals.deferred():
        os.kill(os.getpid(), INT)
        raise ValueError("of its own")
    with signals.handled(lambda *_: seen.append("of the command")), signals.deferred():
        os.kill(os.getpid(), INT)  # the command has a handler of its own: nothing is deferred
    assert seen == ["the step and its observers", "of the command"]


class Loop(Start):
    """A loop of the user's own over the steps, begun again after each Ctrl-C."""

    def command(self, config: Experiment, workdir: Path) -> int:
        interrupted, self.yielded = 0, list[int]()
        with Run(config, workdir, self.said.append) as run:
            run.observers.append(Everywhere(self.reached))
            run.evaluators = [self.evaluate]
            while run.step < STEPS:
                try:
                    self.yielded.extend(step.number for step in run.steps())
                except KeyboardInterrupt:
                    interrupted += 1
        return interrupted


def test_ctrl_c_in_a_loop_of_ones_own_costs_no_step(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    without_arrays(monkeypatch)
    config = experiment({"train.save_every": 3})
    for moment, phase in ((6, "before"), (7, "step"), (8, "save")):
        book, workdir = Diary([]), tmp_path / phase
        workdir.mkdir()
        loop = Loop(monkeypatch, config, workdir, book, moment=moment, numbers=(INT,))
        assert loop.phases[moment] == (phase, 3) and loop.code == 1
        every = [(name, step) for name, step in loop.phases if name in ("step", "after")]
        assert every == [(name, step) for step in range(1, STEPS + 1) for name in ("step", "after")]
        assert list(book.saved) == [3, 6, STEPS] and 3 not in loop.yielded
