"""The record of what changed in mid-run, planned or not: a line of `interventions.jsonl` for every change.

The same changes may stand in a config from the start, as `interventions`; so a record can be replayed.
"""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.storage.files import json_line, write_atomic
from glm_jax.types import Json

RECORD = "interventions.jsonl"

Changes = Mapping[str, tuple[object, object]]  # dotted key -> before, after; None where the key is absent


class Record:
    """The file `interventions.jsonl` of a workdir: a line for every change that took effect, by step."""

    def __init__(self, workdir: Path, step: int, *, primary: bool = True) -> None:
        """Open the record at `step`, and forget what comes later.

        Args:
            workdir: of the run.
            step: where the run stands.
            primary: whether this process writes; the others only know.
        """
        self._path, self._primary = workdir / RECORD, primary
        self.lines = read(self._path) if self._path.exists() else []
        self.forget(step)

    def forget(self, step: int) -> None:
        """Forget changes after `step`, as they will be made again, and a line that was cut off.

        Changes at `step` itself are made again as well, for a checkpoint holds the config that it was reached with;
        but a spike that was gone back from to `step` stays known.
        """
        self.lines = [line for line in self.lines if line["step"] < step + (line["cause"] == "spike")]
        text = "".join(map(json_line, self.lines))
        if self._primary and self._path.exists() and self._path.read_text(encoding="utf-8") != text:
            with self._writing():
                write_atomic(self._path, text)

    def add(self, step: int, samples: int, cause: str, changes: Changes, **more: object) -> Json:
        """Write down changes that take effect with the step after `step`. Returns the line."""
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
            with self._writing(), open(self._path, "a", encoding="utf-8") as file:
                file.write(json_line(line))
                file.flush()
                os.fsync(file.fileno())
        return line

    @contextlib.contextmanager
    def _writing(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise UserError(
                f"{self._path} cannot be written ({error.strerror}): make room, then the same command resumes"
            ) from error

    def spikes(self) -> list[Json]:
        """Return the lines of the spikes that were gone back from."""
        return [line for line in self.lines if line["cause"] == "spike"]

    def skipped(self) -> list[tuple[int, int]]:
        """Return the ranges of steps, first and last, that those spikes had skipped."""
        return [(line["skipped"][0], line["skipped"][1]) for line in self.spikes()]


def read(path: Path) -> list[Json]:
    """Read a record.

    Raises:
        UserError: it cannot be read, or a line is damaged, save for a last one that was cut off.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read as a record of interventions: is the path right?") from error
    lines = []
    for number, line in enumerate(text.splitlines(), 1):
        try:
            lines.append(_entry(json.loads(line)))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            if number == len(text.splitlines()) and not text.endswith("\n"):
                break
            raise UserError(f"{path}, line {number}, is damaged: bring the file back") from error
    return lines


def _entry(line: Json) -> Json:
    changes = {key: [before, after] for key, (before, after) in line["changes"].items()}
    entry = {**line, "step": int(line["step"]), "cause": str(line["cause"]), "changes": changes}
    if entry["cause"] == "spike":
        first, last = line["skipped"]
        entry["skipped"] = [int(first), int(last)]
    return entry


def plan(lines: Iterable[Json]) -> tuple[tuple[int, Json], ...]:
    """Turn a record into the config's `interventions`, which make the same changes at the same steps."""
    return tuple((line["step"], {key: after for key, (_, after) in line["changes"].items()}) for line in lines)
