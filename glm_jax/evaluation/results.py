"""The results of an evaluation on disk: results.json, results.md, and items.jsonl with what each item adds."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from glm_jax.errors import UserError
from glm_jax.evaluation import measures
from glm_jax.evaluation.measures import Difference, Estimate
from glm_jax.storage.files import json_line, write_atomic

if TYPE_CHECKING:
    from glm_jax.evaluation.contamination import Contamination
    from glm_jax.evaluation.run import Failure, FileReport, TaskReport

RESULTS, TABLE, ITEMS, PAGE, PART = "results.json", "results.md", "items.jsonl", "index.html", "results.part"
SHORT = 12  # characters of a digest


class Made(NamedTuple):
    """How results were made."""

    model: Mapping[str, object]  # workdir, step, dtype, digests
    command: str
    seconds: float
    tokens: int  # that the model read and made, about
    resumed: int  # units that an earlier command had done


class Evaluation(NamedTuple):
    """A finished evaluation."""

    made: Made
    reports: Sequence[TaskReport]
    failures: Sequence[Failure]


def write(folder: Path, found: Evaluation) -> None:
    """Write results.json, results.md and items.jsonl.

    Raises:
        OSError: the disk refuses them.
    """
    write_atomic(folder / ITEMS, "".join(map(json_line, _items(found))))
    write_atomic(folder / TABLE, table(found))
    write_atomic(folder / RESULTS, json.dumps(json.loads(json_line(as_json(found))), indent=1) + "\n")


def as_json(found: Evaluation) -> dict[str, object]:
    """Return everything but the items."""
    made = found.made
    speed = made.tokens / made.seconds if made.seconds else 0.0
    return {
        "model": made.model,
        "command": made.command,
        "seconds": round(made.seconds, 3),
        "tokens": made.tokens,
        "tokens_per_second": round(speed, 1),
        "resumed": made.resumed,
        "failures": [{"task": one.task, "error": one.error} for one in found.failures],
        "tasks": [_task(report) for report in found.reports],
    }


def _task(report: TaskReport) -> dict[str, object]:
    task = report.task
    return {
        "name": task.name,
        "file": str(task.file),
        "type": task.kind,
        "module": task.module,
        "ignored": list(task.ignored),
        "paper": report.paper,
        "groups": {name: {key: one._asdict() for key, one in group.items()} for name, group in report.groups.items()},
        "files": [
            {
                "group": file.group,
                "file": file.name,
                "items": file.items,
                "truncated": file.truncated,
                "shots": file.shots,
                "dropped_examples": file.dropped,
                "contamination": file.contamination and file.contamination._asdict(),
                "measures": {name: one._asdict() for name, one in file.estimates.items()},
                "examples": [example._asdict() for example in file.examples],
            }
            for file in report.files
        ],
    }


def _items(found: Evaluation) -> Iterator[dict[str, object]]:
    for report in found.reports:
        for file in report.files:
            for name, columns in file.columns.items():
                yield {"task": report.task.name, "group": file.group, "file": file.name, "measure": name,
                       "columns": columns.tolist()}  # fmt: skip


def shown(name: str, value: float) -> str:
    """Return the value of a measure as text."""
    digits = 2 if measures.measure(name).percent or abs(value) >= 100 else 4
    return f"{value:,.{digits}f}"


def interval(name: str, one: Estimate | Difference) -> str:
    """Return the 95% interval of a measure as text."""
    return "" if math.isnan(one.low) else f"{shown(name, one.low)} to {shown(name, one.high)}"


def counts(files: Sequence[FileReport]) -> list[dict[str, str]]:
    """Return what was counted in each file of a task, by the names of columns, which all its files share."""
    found = [{"contexts cut": f"{file.truncated:,}"} for file in files]
    if any(file.shots for file in files):
        shots = [{"examples": str(file.shots), "examples dropped": f"{file.dropped:,}"} for file in files]
        found = [one | other for one, other in zip(found, shots, strict=True)]
    if seen := [file.contamination for file in files if file.contamination]:
        found = [one | _contamination(other) for one, other in zip(found, seen, strict=True)]
    return found


def _contamination(found: Contamination) -> dict[str, str]:
    """Return the shares of items and n-grams that training text has."""
    shares = (found.found_items, found.items), (found.found_ngrams, found.ngrams)
    texts = (f"{100 * some / every:.2f}% of {every:,}" if every else "too short" for some, every in shares)
    return dict(zip(("items in training text", "n-grams in training text"), texts, strict=True))


def table(found: Evaluation) -> str:
    """Return the results as Markdown."""
    made = found.made
    whole = as_json(found)
    model = ", ".join(f"{key} {str(value)[:SHORT]}" for key, value in made.model.items() if key != "workdir")
    lines = ["# Evaluation", "", f"{made.model.get('workdir')}: {model}.", "", f"`{made.command}`", ""]
    lines += [f"{made.seconds:,.1f} seconds, {whole['tokens_per_second']} tokens a second"
              + (f"; {made.resumed} results are of an earlier command" if made.resumed else "") + ".", ""]  # fmt: skip
    for failure in found.failures:
        lines.append(f"- failed: {failure.task}: {failure.error}")
    for report in found.reports:
        lines += ["", f"## {report.task.name}", ""]
        if report.paper:
            lines += [f"To be compared with: {report.paper}.", ""]
        counted = counts(report.files)
        heads = ["group", "file", "measure", "value", "95% interval", "items", *counted[0]]
        lines += [f"| {' | '.join(heads)} |", f"|{'---|' * len(heads)}"]
        for file, others in zip(report.files, counted, strict=True):
            for name, one in file.estimates.items():
                values = [shown(name, one.value), interval(name, one), f"{one.items:,}", *others.values()]
                lines.append(f"| {' | '.join([file.group, file.name, name, *values])} |")
        lines += ["", "| group | measure | files | max | median | mean | weighted |", "|---|---|---|---|---|---|---|"]
        for group, summaries in report.groups.items():
            for name, one in summaries.items():
                values = (shown(name, value) for value in (one.highest, one.median, one.mean, one.weighted))
                lines.append(f"| {group} | {name} | {one.files} | {' | '.join(values)} |")
    return "\n".join(lines) + "\n"


Key = tuple[str, str, str, str]  # task, group, file, measure


def read_items(folder: Path) -> dict[Key, np.ndarray]:
    """Return the columns of all measures of an evaluation's folder.

    Raises:
        UserError: it holds no finished evaluation, or is damaged.
    """
    path = folder / ITEMS
    found = dict[Key, np.ndarray]()
    try:
        for line in path.read_text(encoding="utf-8").splitlines():
            one: dict[str, Any] = json.loads(line)
            columns = np.array(one["columns"], float)
            if columns.ndim != 2 or not len(columns):
                raise ValueError
            found[one["task"], one["group"], one["file"], one["measure"]] = columns
            measures.measure(one["measure"])
    except OSError as error:
        raise UserError(f"{folder} holds no finished evaluation ({error.strerror}: {ITEMS}): name the folder that "
                        "`evaluate --out` wrote") from error  # fmt: skip
    except (ValueError, LookupError, TypeError, RecursionError):
        raise UserError(f"{path} is damaged: evaluate again") from None
    return found


def compare(
    first: Path, second: Path, *, resamples: int = measures.RESAMPLES
) -> tuple[dict[Key, Difference], list[Key]]:
    """Compare two evaluations over the same items.

    Returns:
        The differences of all measures that both have, and the measures that cannot be compared: those of one alone,
        or of another number of items.

    Raises:
        UserError: a folder holds no finished evaluation, or the two have no measure in common.
    """
    one, other = read_items(first), read_items(second)
    fitting = [key for key in one if key in other and one[key].shape == other[key].shape]
    if not fitting:
        raise UserError(f"{first} and {second} have no task in common: evaluate both on the same tasks")
    found = {key: measures.compare(key[3], one[key], other[key], resamples=resamples) for key in fitting}
    return found, [key for key in [*one, *other] if key not in found]
