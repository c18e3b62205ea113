"""An evaluation: the data files of many tasks, done unit by unit, and what came out of them."""

from __future__ import annotations

import hashlib
import itertools
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation import measures, task_files
from glm_jax.evaluation.contamination import Contamination
from glm_jax.evaluation.few_shot import NONE, Shots
from glm_jax.evaluation.kinds import open_work
from glm_jax.evaluation.measures import Estimate
from glm_jax.evaluation.protocols import PAPER
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.work import Columns, Example, Result, Work
from glm_jax.inference.batch import Decoder, NotFinite

EXAMPLES = 3  # hits, and misses, of each file that a report shows


class Part(NamedTuple):
    """One data file of a task."""

    task: Task
    group: str
    name: str  # of the file, below the task's path
    work: Work
    first: int  # the number of its first unit among all


class Failure(NamedTuple):
    """A task that cannot be done."""

    task: str  # its name, if that could be read, or else its file
    error: str
    file: Path | None = None


class Plan(NamedTuple):
    """What is to be done."""

    parts: list[Part]
    failures: list[Failure]
    digest: str  # of task files and data files
    units: int


def plan(
    decoder: Decoder,
    tokenizer: Tokenizer,
    places: Sequence[str | Path | UserError],
    data: Path | None = None,
    shots: Shots = NONE,
) -> Plan:
    """Read task files and their data; a task that has anything wrong is a failure, and the others stay.

    Args:
        decoder: the model, whose rows the texts must fit in.
        tokenizer: of the model.
        places: task files, and folders of them; or why there is none.
        data: the root of the data; None is the folder of each task file.
        shots: examples before each question, in the protocols whose items have a right answer.
    """
    parts, failures, digest, count = list[Part](), list[Failure](), hashlib.sha256(), 0
    for found in task_files.find(places):
        if isinstance(found, UserError):
            failures.append(Failure("", str(found)))
            continue
        name = str(found)
        try:
            task = task_files.read(found)
            name, new, first = task.name, list[Part](), count
            root, read = data or found.parent, [found]
            for group, files in task.files(root).items():
                for file in files:
                    examples = task.examples_file(root, file) if shots.count else None
                    work = open_work(decoder, tokenizer, task, file, shots, examples)
                    read += [file] if examples is None else [file, examples]
                    new.append(Part(task, group, str(file.relative_to(root / task.path)), work, first))
                    first += work.count
        except UserError as error:
            failures.append(Failure(name, str(error), found))
            continue
        for path in read:
            digest.update(f"{path.name} {path.stat().st_size} ".encode() + path.read_bytes())
        parts, count = [*parts, *new], first
    return Plan(parts, failures, digest.hexdigest(), count)


class Progress(NamedTuple):
    """Units that were done together."""

    results: list[tuple[int, Result]]  # by their numbers among all units
    tokens: int  # that the model read and made, about
    seconds: float


def run(todo: Plan, done: Mapping[int, Result]) -> Iterator[Progress]:
    """Do the units that are not done, and yield their results as they come.

    A task that fails joins the plan's failures, and the others continue.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    for part in todo.parts:
        left = [number for number in range(part.work.count) if part.first + number not in done]
        started = time.monotonic()
        try:
            for batch in part.work.run(left) if left else ():
                tokens = sum(part.work.tokens(number) for number, _ in batch)
                results = [(part.first + number, result) for number, result in batch]
                yield Progress(results, tokens, time.monotonic() - started)
                started = time.monotonic()
        except NotFinite:
            raise
        except UserError as error:
            todo.failures.append(Failure(part.task.name, f"{part.name}: {error}", part.task.file))


class FileReport(NamedTuple):
    """What came out of a data file."""

    group: str
    name: str
    items: int
    truncated: int
    shots: int  # examples before each question, before any is dropped
    dropped: int  # of these, over all items, those without room
    estimates: dict[str, Estimate]
    columns: Columns
    examples: list[Example]
    contamination: Contamination | None  # None if nobody asked


class TaskReport(NamedTuple):
    """What came out of a task."""

    task: Task
    files: list[FileReport]
    groups: dict[str, dict[str, Summary]]  # of each group, and of all files ("overall") if there are several groups
    paper: str  # the number that the paper has for it


class Summary(NamedTuple):
    """A measure over the files of a group, which are often the prompts of one data set."""

    files: int
    highest: float
    median: float
    mean: float
    weighted: float  # by the items of each file


def report(
    todo: Plan,
    done: Mapping[int, Result],
    *,
    resamples: int = measures.RESAMPLES,
    contamination: Sequence[Contamination] = (),
) -> list[TaskReport]:
    """Return what came out of all tasks that did not fail; one that fails now joins the plan's failures.

    Args:
        todo: the plan.
        done: the results of all units of these tasks.
        resamples: of the intervals.
        contamination: of each part of the plan; empty if nobody asked.
    """
    failed = {failure.file for failure in todo.failures}
    found = dict[Path, tuple[Task, list[FileReport]]]()
    for part, seen in itertools.zip_longest(todo.parts, contamination):
        file = part.task.file
        if file in failed:
            continue
        try:
            made = _file(part, done, resamples)._replace(contamination=seen)
        except UserError as error:
            todo.failures.append(Failure(part.task.name, f"{part.name}: {error}", file))
            failed.add(file)
            found.pop(file, None)
            continue
        found.setdefault(file, (part.task, []))[1].append(made)
    return [TaskReport(task, files, _groups(files), PAPER.get(task.name, "")) for task, files in found.values()]


def _file(part: Part, done: Mapping[int, Result], resamples: int) -> FileReport:
    work = part.work
    results = [done[part.first + number] for number in range(work.count)]
    columns = work.columns(results)
    estimates = {name: measures.estimate(name, values, resamples=resamples) for name, values in columns.items()}
    totals = work.totals(results)
    estimates |= {name: Estimate(value, math.nan, math.nan, work.items) for name, value in totals.items()}
    examples = work.examples(results)
    hits = [one for one in examples if one.right][:EXAMPLES]
    misses = [one for one in examples if not one.right][:EXAMPLES]
    return FileReport(part.group, part.name, work.items, work.truncated, work.shots, work.dropped, estimates, columns,
                      [*hits, *misses], None)  # fmt: skip


def _groups(files: Sequence[FileReport]) -> dict[str, dict[str, Summary]]:
    names = list(dict.fromkeys(file.group for file in files))
    found = {name: _summaries([file for file in files if file.group == name]) for name in names}
    return found | ({"overall": _summaries(files)} if len(names) > 1 else {})


def _summaries(files: Sequence[FileReport]) -> dict[str, Summary]:
    found = dict[str, Summary]()
    for name in dict.fromkeys(name for file in files for name in file.estimates):
        held = [file for file in files if name in file.estimates]
        values = [file.estimates[name].value for file in held]
        weighted = float(np.average(values, weights=[file.items for file in held]))
        found[name] = Summary(len(held), max(values), statistics.median(values), math.fsum(values) / len(values),
                              weighted)  # fmt: skip
    return found
