"""Results of sweeps small enough to be committed, with the curves that notebooks draw.

    python -m glm_jax.sweeps.saved runs/norms experiments/ablations/results/norms

The folder holds three files, even for a sweep that is not complete. Members of the same sweep that it already holds
and the workdir lacks stay, so that a long sweep can be trained in parts (`glm-jax sweep --only`), each in a workdir of
its own:

    sweep.json, results.json    as they are in the sweep's workdir; docs/ablations.md is written from them
    curves.json                 for each member, the moving average of its loss (verdict.smooth), its gradient norms,
                                the rms of its activations and, if logged, its attention scores, at some tens of steps,
                                to DIGITS digits

Without saved results, `train_small` trains a few small members in the calling process, and returns the same form.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np

from glm_jax.config import Config, by_key, resolve, source
from glm_jax.data.corpora.samples import docstrings
from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic
from glm_jax.sweeps import group as sweep_group
from glm_jax.sweeps import members as sweep_members
from glm_jax.sweeps import verdict
from glm_jax.sweeps.results import (
    DESCRIPTION,
    RESULTS,
    Row,
    provenance,
    read_all,
    read_description,
    row,
    rule,
    steps_text,
)
from glm_jax.sweeps.worker import result
from glm_jax.types import Json

CURVES = "curves.json"
WATCHED = ("grad_norm", "activation_rms", "attention_scores")  # how the names of its other curves begin
DIGITS = 4  # significant
LARGEST = 800_000  # bytes of curves.json to aim at, with all members
NUMBER = 8  # bytes of a number in curves.json, with its comma
FEWEST, MOST = 20, 200  # points of a curve

# Modules of the standard library with long docstrings: a text that comes with every Python.
MODULES = ("argparse", "calendar", "configparser", "datetime", "difflib", "doctest", "fractions", "functools",
           "gettext", "inspect", "locale", "optparse", "pathlib", "pdb", "pickletools", "random", "shutil",
           "statistics", "string", "subprocess", "tarfile", "textwrap", "threading", "typing", "zipfile")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Saved:
    """Results of a sweep.

    Attributes:
        description: as in sweep.json; its `command` and `commit` are None if the members were trained on the spot.
        results: the rows of results.json for the members so far, in their order, with `curves` by name: `loss` [n], the
            moving average, at `loss_step`, and the others [m] at `step`. NaN where a value was not finite.
    """

    description: Json
    results: list[Row]

    @property
    def members(self) -> int:
        """Return the number of members of the whole sweep."""
        return len(self.description["members"])

    def renamed(self, axis: str, name: str, names: Mapping[str, str]) -> Saved:
        """Return the results whose label of `axis` is in `names`, with the axis and its labels renamed."""
        kept = [found for found in self.results if found["labels"][axis] in names]
        labels = [
            {name if key == axis else key: names[label] if key == axis else label for key, label in old.items()}
            for old in (found["labels"] for found in kept)
        ]
        results = [{**found, "labels": new} for found, new in zip(kept, labels, strict=True)]
        return dataclasses.replace(self, results=results)

    def origin(self) -> str:
        """Return the source of the results in Markdown, and how much of the sweep they cover."""
        there = len(self.results)
        if not self.description["command"]:
            return (
                f"**No saved results: {there} small members, trained just now**, "
                f"{steps_text(self.description['base'])}, on docstrings of Python's standard library. They show that "
                "the figures work, and nothing else."
            )
        state = "complete" if there == self.members else "incomplete"
        return f"**Saved results, {state}:** {provenance(self.description, self.results)}.{self._coverage()}"

    def _coverage(self) -> str:
        """Return how many members each label of the first axis has; empty for a complete sweep."""
        if len(self.results) == self.members:
            return ""
        axis, values = next(iter(self.description["axes"].items()))
        each = self.members // len(values)
        counts = {label: sum(found["labels"][axis] == label for found in self.results) for label in values}
        told = ", ".join(f"{label}: {count} of {each}" for label, count in counts.items())
        return f" By {axis}: {told}."


def thin(full: Row, points: int) -> dict[str, list[float | None]]:
    """Return the curves of a member's result that figures draw, thinned to about `points` points at most."""
    curves = full["curves"]
    losses = np.array(curves["loss"], np.float64)  # [T], None becomes NaN
    kept = {"loss_step": np.arange(1, len(losses) + 1), "loss": verdict.smooth(losses)}
    shown = {name: _thinned(values, points) for name, values in kept.items()}
    for name in ["step", *sorted(name for name in curves if name.startswith(WATCHED))]:
        shown[name] = _thinned(np.array(curves[name], np.float64), points)
    return shown


def _thinned(values: np.ndarray, points: int) -> list[float | None]:
    """Return every n-th value counted from the last, and the first; rounded, None if not finite."""
    every = -(-len(values) // points)
    places = sorted({0, *range(len(values) - 1, 0, -every)})
    return [_rounded(values[place]) for place in places]


def _rounded(value: float) -> float | None:
    if not np.isfinite(value):
        return None
    return int(value) if float(value).is_integer() and abs(value) < 1e6 else float(f"{value:.{DIGITS}g}")


def save(workdir: Path, folder: Path) -> int:
    """Write the results of a sweep so far, and return the number of members that the folder then has.

    Raises:
        UserError: the workdir holds no sweep or no result, or a damaged one; or the folder has another sweep's.
    """
    description, results = read_description(workdir) | rule(), read_all(workdir)  # the rule that judges the rows
    if not results:
        raise UserError(f"{workdir} has no finished member yet: wait for the first group of the sweep")
    numbers = sum(name.startswith(WATCHED) for name in results[0]["curves"]) + 3  # and two of steps, and the loss
    points = LARGEST // (NUMBER * numbers * len(description["members"]))
    points = min(MOST, max(FEWEST, points))
    rows, curves = _kept(folder, description)
    rows |= {found["name"]: {**row(found), "commit": description["commit"]} for found in results}
    curves |= {found["name"]: thin(found, points) for found in results}
    names = [name for name in description["members"] if name in rows]
    lines = [f"{json.dumps(name)}: {_compact(curves[name])}" for name in names]
    write_atomic(folder / CURVES, "{\n" + ",\n".join(lines) + "\n}\n")
    write_atomic(folder / RESULTS, json.dumps([rows[name] for name in names], indent=1) + "\n")
    write_atomic(folder / DESCRIPTION, json.dumps(description, indent=1) + "\n")
    return len(names)


def _kept(folder: Path, description: Json) -> tuple[dict[str, Row], dict[str, Json]]:
    """Return the rows and the curves that a folder already has, by member."""
    if not (folder / DESCRIPTION).exists():
        return {}, {}
    saved = load(folder)
    before, now = saved.description, description
    same = [before.get(what) == now.get(what) for what in ("axes", "members", "data", "rule")]
    bases = before["base"].keys() & now["base"].keys()  # newer code has more keys, which are at their defaults
    if not all(same) or any(before["base"][key] != now["base"][key] for key in bases):
        raise UserError(f"{folder} holds results of another sweep: remove them, or name another folder")
    rows = {found["name"]: {key: value for key, value in found.items() if key != "curves"} for found in saved.results}
    for found in rows.values():
        found.setdefault("commit", before["commit"])
    curves = {
        found["name"]: {name: list(map(_rounded, values)) for name, values in found["curves"].items()}
        for found in saved.results
    }
    return rows, curves


def _compact(value: object) -> str:
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def load(folder: Path) -> Saved:
    """Read what `save` wrote.

    Raises:
        UserError: the folder holds no sweep, or a damaged file.
    """
    description = read_description(folder)
    try:
        rows = json.loads((folder / RESULTS).read_text(encoding="utf-8"))
        curves = json.loads((folder / CURVES).read_text(encoding="utf-8"))
        return Saved(description, [{**found, "curves": _arrays(curves[found["name"]])} for found in rows])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{folder} has damaged results or curves: write them again from the sweep's workdir") from error


def _arrays(curves: Mapping[str, list[float | None]]) -> dict[str, np.ndarray]:
    return {name: np.array(values, np.float64) for name, values in curves.items()}


def train_small(base: Config, axes: Mapping[str, object]) -> Saved:
    """Train the members of a small sweep on the spot, on docstrings of the standard library, without a workdir.

    Args:
        base: not resolved; its sources are replaced.
        axes: as returned by `get_sweep` of an ablation.

    Raises:
        UserError: a key or a value is not valid.
    """
    sweep = sweep_members.read_axes(axes)
    with TemporaryDirectory() as folder:
        text = Path(folder) / "text.jsonl"
        text.write_text("".join(json.dumps({"text": doc}) + "\n" for doc in standard_docstrings()), encoding="utf-8")
        changed = base.copy_and_resolve_references()
        changed.data.cache = str(Path(folder) / "cache")
        changed.data.sources = {"en": source(path=str(text), format="jsonl")}
        resolved = resolve(changed)
        members = sweep_members.expand(resolved, sweep)
        results = [found for group in sweep_members.group(members) for found in _train_group(group)]
    order = [member.name for member in members]
    results.sort(key=lambda found: order.index(found["name"]))
    description = {"command": None, "commit": None, "base": by_key(resolved), "axes": sweep,
                   "members": order}  # fmt: skip
    return Saved(description, results)


def _train_group(group: sweep_members.Group) -> list[Row]:
    members = [member.config for member in group.members]
    prepared = sweep_group.prepare_all(members, lambda line: None)
    outcomes = sweep_group.train(members, prepared, lambda step: None)
    results = []
    for member, outcome in zip(group.members, outcomes, strict=True):
        full = result(member.config, outcome)
        named = {"name": member.name, "labels": dict(member.labels), "changes": dict(member.changes)}
        results.append({**named, **row(full), "curves": _arrays(thin(full, MOST))})
    return results


def standard_docstrings() -> list[str]:
    """Return the docstrings of MODULES, a few hundred kilobytes."""
    specs = [importlib.util.find_spec(name) for name in MODULES]
    paths = [Path(spec.origin) for spec in specs if spec and spec.origin]
    return [text for path in paths for text in docstrings(path.read_text(encoding="utf-8"))]


if __name__ == "__main__":
    try:
        print(f"{save(Path(sys.argv[1]), Path(sys.argv[2]))} members in {sys.argv[2]}")
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
