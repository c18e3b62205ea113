"""A run's history as its workdir holds it: its events, and marks of what was done or happened to it."""

from __future__ import annotations

import dataclasses
import fnmatch
import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Literal, TypeGuard

import numpy as np

from glm_jax.errors import UserError
from glm_jax.types import Json
from glm_jax.workdir import interventions
from glm_jax.workdir.events import METRICS

Kind = Literal["intervention", "spike", "failure", "restart"]

MARK_NAMES: dict[Kind, str] = {
    "intervention": "intervention",
    "spike": "spike, gone back from",
    "failure": "failed checkpoint",
    "restart": "restart",
}


@dataclasses.dataclass(frozen=True)
class Mark:
    """Something that happened at a step, numbered in order of steps from 1."""

    number: int
    step: int
    samples: int | None
    kind: Kind
    cause: str  # a word or two
    lines: tuple[str, ...]  # the details: changes `key: before → after`, or a message


@dataclasses.dataclass(frozen=True)
class Series:
    """A value over time: steps [n], int64, ascending, and values [n], float64, NaN where not finite."""

    steps: np.ndarray
    values: np.ndarray


class Record:
    """A run's events by kind, in order, and its marks."""

    def __init__(self, events: list[Json], changes: list[Json]) -> None:
        self.events: dict[str, list[Json]] = {}
        for event in events:
            self.events.setdefault(event["event"], []).append(event)
        found = sorted([*_operator_marks(changes), *_run_marks(events)], key=lambda mark: mark.step)
        self.marks = [dataclasses.replace(mark, number=number) for number, mark in enumerate(found, 1)]

    def kinds(self) -> list[Kind]:
        """Return the kinds of marks that occur."""
        present = {mark.kind for mark in self.marks}
        return [kind for kind in MARK_NAMES if kind in present]

    @property
    def first_step(self) -> int:
        """The first step with an event."""
        return min(events[0]["step"] for events in self.events.values())

    @property
    def last_step(self) -> int:
        """The last step with an event."""
        return max(events[-1]["step"] for events in self.events.values())

    def last(self, kind: str) -> Json:
        """Return the last event of a kind, or an empty one if there is none."""
        return self.events.get(kind, [{}])[-1]

    def names(self, kind: str, pattern: str) -> list[str]:
        """Return the keys of a kind's events that match a pattern such as loss/*, in order of appearance."""
        seen = dict.fromkeys(key for event in self.events.get(kind, []) for key in event)
        return [key for key in seen if fnmatch.fnmatchcase(key, pattern)]

    def series(self, kind: str, key: str) -> Series | None:
        """Return the numbers of one key over time, or None if none of them is finite."""
        pairs = [
            (event["step"], event[key])
            for event in self.events.get(kind, [])
            if isinstance(event.get(key), int | float)
        ]
        steps, values = np.array([step for step, _ in pairs], np.int64), np.array([value for _, value in pairs], float)
        finite = np.isfinite(values)
        return Series(steps, np.where(finite, values, np.nan)) if finite.any() else None

    def layers(self, key: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Return a key's values by layer in train events, steps [n] and values [n, L], or None if there are none."""
        found = [event for event in self.events.get("train", []) if isinstance(event.get(key), list)]
        found = [event for event in found if len(event[key]) == len(found[-1][key])]
        values = np.array([event[key] for event in found], float)  # [n, L]
        if not np.isfinite(values).any():
            return None
        return np.array([event["step"] for event in found]), np.where(np.isfinite(values), values, np.nan)

    def seconds(self) -> float:
        """Return the approximate time spent training: each logged step stands for those since the last one."""
        total, before = 0.0, 0
        for event in self.events.get("train", []):
            if speed := event.get("tokens_per_second"):
                total += event.get("tokens", 0) * (event["step"] - before) / speed
            before = event["step"]
        return total

    def tokens(self) -> int:
        """Return the approximate number of tokens trained on: each logged step stands for those since the last one."""
        total, before = 0, 0
        for event in self.events.get("train", []):
            total += event.get("tokens", 0) * (event["step"] - before)
            before = event["step"]
        return total


def read(workdir: Path) -> Record:
    """Read the record of a run.

    Raises:
        UserError: there is none, or a line of it is damaged. An incomplete last line is skipped.
    """
    path = workdir / METRICS
    if not path.exists():
        raise UserError(f"{workdir} has no {METRICS}: check --workdir, or train in it first")
    events = list(_lines(path))
    if not events:
        raise UserError(f"{path} has no events yet: wait until the run has logged its first, or restore it")
    changes = workdir / interventions.RECORD
    return Record(events, interventions.read(changes) if changes.exists() else [])


def _lines(path: Path) -> Iterator[Json]:
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").rstrip("\n").split("\n")
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): fix it, or name another --workdir") from error
    for number, line in enumerate(lines, 1):
        try:
            event = json.loads(line)
        except (ValueError, RecursionError):
            event = None
        if _is_event(event):
            yield {key: _not_finite_again(value) for key, value in event.items()}
        elif number < len(lines):
            raise UserError(f"line {number} of {path} is damaged: remove it, then make the report again")


def _is_event(line: object) -> TypeGuard[Json]:
    """Whether a line's values have the types that reports rely on."""
    if not isinstance(line, dict) or not isinstance(line.get("event"), str):
        return False
    step, versions = line.get("step"), line.get("versions", {})
    counts = [line[key] for key in ("samples", "tokens") if key in line]
    losses = [value for key, value in line.items() if str(key).split("/")[0] == "loss"]
    lists = [entry for value in line.values() if isinstance(value, list) for entry in value]
    return (
        isinstance(step, int)
        and 0 <= step < 2**63
        and isinstance(versions, dict)
        and all(isinstance(value, int | float | None) for value in [*counts, *losses, *lists])
    )


def _not_finite_again(value: object) -> object:
    """Return NaN for null, alone or in a list: numbers that are not finite are written as null."""
    if isinstance(value, list):
        return [_not_finite_again(entry) for entry in value]
    return math.nan if value is None else value


def _operator_marks(changes: list[Json]) -> Iterator[Mark]:
    for event in changes:
        kind = "spike" if event.get("cause") == "spike" else "intervention"
        lines = []
        if "seen" in event:
            seen = event["seen"]
            values = [f"{key} {_number(seen[key])}" for key in ("loss", "grad_norm") if key in seen]
            lines.append(f"seen at step {seen.get('step', '?')}: " + ", ".join([*values, seen.get("reason", "")]))
        if "weights" in event:
            lines.append(", ".join(f"{key} {value}" for key, value in event["weights"].items()))
        for key, (before, after) in event.get("changes", {}).items():
            lines.append(f"{key}: {_value(before)} → {_value(after)}")
        yield Mark(0, event["step"], event.get("samples"), kind, event.get("cause", ""), tuple(lines))


def _run_marks(events: list[Json]) -> Iterator[Mark]:
    for event in events:
        if event["event"] == "checkpoint" and "error" in event:
            yield Mark(0, event["step"], event.get("samples"), "failure", "checkpoint failed", (str(event["error"]),))
        if event["event"] == "start" and event["step"] > 0:
            yield Mark(0, event["step"], event.get("samples"), "restart", "restart", ())


def _value(value: object) -> str:
    return "absent" if value is None else json.dumps(value, ensure_ascii=False)


def _number(value: object) -> str:
    return "not finite" if value is None else f"{value:.4g}" if isinstance(value, int | float) else str(value)
