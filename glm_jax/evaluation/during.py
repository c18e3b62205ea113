"""Tasks during training: a run scores its params on what `train.evaluators` names, on its own mesh."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from glm_jax.config import Experiment
from glm_jax.engine.weights import DecodeConfig, Weights
from glm_jax.errors import UserError
from glm_jax.evaluation import run as evaluation
from glm_jax.evaluation import task_files
from glm_jax.evaluation.measures import event_name
from glm_jax.evaluation.run import Plan, TaskReport
from glm_jax.evaluation.tasks.build import build
from glm_jax.evaluation.tasks.names import is_name
from glm_jax.inference import Model
from glm_jax.inference.batch import Decoder, NotFinite
from glm_jax.training.observers import Observer, Step
from glm_jax.training.run import Run
from glm_jax.training.stretch import Stretch

EVENT = "tasks"


class Scheduled(NamedTuple):
    """A task and how often it is done."""

    plan: Plan
    every: int  # steps


class Tasks(Observer):
    """Scores the run on tasks, each every so many steps, before the first step and after the last one.

    It logs an event with a number for each measure: `accuracy/NAME` and others, of all files of a task, each weighted
    by its items. It comes before `Save`, so that the log has what belongs to each checkpoint.
    """

    def __init__(self, scheduled: Sequence[Scheduled]) -> None:
        self._scheduled = scheduled

    def before(self, run: Run) -> None:
        if run.step == 0:
            self._score(run, self._scheduled)

    def after(self, step: Step) -> None:
        self._score(step.run, [one for one in self._scheduled if step.is_due(one.every)])

    def skipped(self, run: Run) -> None:
        if run.step == run.current.train.steps:
            self._score(run, self._scheduled)

    def _score(self, run: Run, due: Sequence[Scheduled]) -> None:
        if not due:
            return
        tokenizer, precision = run.prepared.tokenizer, run.current.train.precision
        model = Model(run.model, run.params, tokenizer, run.stretch.mesh, dtype=precision, source=f"step {run.step}")
        values: dict[str, float] = {}
        try:
            for one in due:
                values |= _values(one.plan, model.decoder)
        except NotFinite as error:  # the run goes on, as with a held-out loss that is not finite
            run.say(f"tasks at step {run.step} are left out: {error}")
            return
        run.log({"event": EVENT, "step": run.step, **values})
        run.say(f"tasks at step {run.step}: {', '.join(f'{name} {value:.4g}' for name, value in values.items())}")
        run.stretch.meter.restart()


def _values(plan: Plan, decoder: Decoder) -> dict[str, float]:
    """Do a task and return its numbers by name, such as `accuracy/NAME`."""
    for part in plan.parts:
        part.work.decoder = decoder
    done = dict(result for batch in evaluation.run(plan, {}) for result in batch.results)
    reports = evaluation.report(plan, done, resamples=0)
    return {name: value for report in reports for name, value in _named(report)}


def _named(report: TaskReport) -> list[tuple[str, float]]:
    whole = report.groups["overall"] if len(report.groups) > 1 else next(iter(report.groups.values()))
    found = list[tuple[str, float]]()
    for name, summary in whole.items():
        measure, slash, part = name.partition("/")
        found.append((f"{event_name(measure)}/{report.task.name}{slash}{part}", summary.weighted))
    return found


def observer(config: Experiment) -> Callable[[Stretch], Observer]:
    """Return what makes the observer of the tasks that a config names.

    The task files are read now. The questions are read once the run's data are prepared, since names ask about text
    that it holds out.

    Raises:
        UserError: a task is unknown, or its file or its data are wrong.
    """
    chosen = config.train.tasks()
    files = {place: Path(place).expanduser() for place, _ in chosen if not is_name(place)}
    with _under_the_key():
        for file in files.values():
            task_files.read(file).files(file.parent)

    def make(stretch: Stretch) -> Observer:
        with _under_the_key():
            found = [Scheduled(_plan(files.get(place) or build(place, config, _quiet), stretch), every)
                     for place, every in chosen]  # fmt: skip
            names = [one.plan.parts[0].task.name for one in found]
            if again := [name for name in names if names.count(name) > 1]:
                raise UserError(f"two tasks are called {again[0]}: give them different names")
        return Tasks(found)

    return make


@contextlib.contextmanager
def _under_the_key() -> Iterator[None]:
    """Let messages begin with the key that names the tasks."""
    try:
        yield
    except UserError as error:
        raise UserError(f"train.evaluators: {error}") from None


def _quiet(line: str) -> None:
    """Drop a line: the run has said it when it prepared its data."""


def _plan(file: Path, stretch: Stretch) -> Plan:
    """Read the questions of a task, which must fit the model's rows."""
    glm, tokenizer = stretch.cfg.engine.model, stretch.prepared.tokenizer
    without = Decoder(DecodeConfig(glm, min(tokenizer.size, glm.vocab_size)), stretch.mesh, Weights((), ()))
    found = evaluation.plan(without, tokenizer, [file])
    if found.failures:
        raise UserError(found.failures[0].error)
    return found
