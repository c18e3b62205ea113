"""The record of changes during a run, planned or not: one line of `interventions.jsonl` for each.

A config may hold the same changes from the start, as `interventions`, so a record can be replayed.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.storage.files import appending, json_line, write_atomic
from glm_jax.types import Json

RECORD = "interventions.jsonl"

Changes = Mapping[str, tuple[object, object]]  # dotted key -> (before, after); None if the key is absent


class Record:
    """The file `interventions.jsonl` of a workdir: one line for each change that took effect, by step."""

    def __init__(self, workdir: Path, step: int, *, primary: bool = True) -> None:
        """Open the record at `step` and drop later lines.

        Args:
            workdir: of the run.
            step: the run's current step.
            primary: whether this process writes the file; the others only keep its lines.
        """
        self._path, self._primary = workdir / RECORD, primary
        self.lines = read(self._path) if self._path.exists() else []
        self.forget(step)

    def forget(self, step: int) -> None:
        """Drop changes after `step`, which will be made again, and an incomplete line.

        Changes at `step` itself are made again, too, because a checkpoint holds the config that reached it. But a spike
        that made the run go back to `step` is kept, and so is what a run began with.
        """
        self.lines = [line for line in self.lines if line["step"] < step + (line["cause"] in ("spike", "init_from"))]
        text = "".join(map(json_line, self.lines))
        if self._primary and self._path.exists() and self._path.read_text(encoding="utf-8") != text:
            with appending(self._path):
                write_atomic(self._path, text)

    def add(self, step: int, samples: int, cause: str, changes: Changes, **more: object) -> Json:
        """Record changes that take effect with the step after `step`, and return the line."""
        line = {
            "event": "intervention",
            "step": step,
            "samples": samples,
            "cause": cause,
            "changes": {key: list(pair) for key, pair in changes.items()},
            **more,
        }
        self.lines.append(line)
        if self._primary:
            with appending(self._path), open(self._path, "a", encoding="utf-8") as file:
                file.write(json_line(line))
                file.flush()
                os.fsync(file.fileno())
        return line

    def spikes(self) -> list[Json]:
        """Return the lines of the spikes that made the run go back."""
        return [line for line in self.lines if line["cause"] == "spike"]

    def skipped(self) -> list[tuple[int, int]]:
        """Return the ranges of steps, (first, last), that were skipped because of spikes."""
        return [(line["skipped"][0], line["skipped"][1]) for line in self.spikes()]


def read(path: Path) -> list[Json]:
    """Read a record.

    Raises:
        UserError: it cannot be read, or a line is damaged. An incomplete last line is skipped.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a record of interventions: is the path right?") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            if number == len(text.splitlines()) and not text.endswith("\n"):
                break
            raise UserError(f"{path}, line {number}, is damaged: restore the file") from error
    return lines


def _entry(line: Json) -> Json:
    changes = {key: [before, after] for key, (before, after) in line["changes"].items()}
    seen = line.get("seen", {})
    if not isinstance(line.get("samples", 0), int) or not isinstance(seen, dict):
        raise TypeError("samples is no number, or seen no object")
    if not isinstance(seen.get("reason", ""), str):
        raise TypeError("the reason is no text")
    entry = {**line, "step": int(line["step"]), "cause": str(line["cause"]), "changes": changes}
    if entry["cause"] == "spike":
        first, last = line["skipped"]
        entry["skipped"] = [int(first), int(last)]
    return entry


def plan(lines: Iterable[Json]) -> tuple[tuple[int, Json], ...]:
    """Return the config's `interventions` that make a record's changes at the same steps."""
    changes = ((line["step"], line["changes"]) for line in lines if line["changes"])  # init_from changes nothing
    return tuple((step, {key: after for key, (_, after) in changed.items()}) for step, changed in changes)
