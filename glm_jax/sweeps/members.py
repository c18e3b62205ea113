"""The parts of a sweep: members, each with its own config, and groups of members that one program can train.

An ablation is an experiment's file with a second function beside `get_config`:

    def get_sweep():
        return {
            "model.norm": ("post", "deepnorm"),
            "feedforward": {
                "geglu": {"model.activation": "geglu", "model.ffn_size": 172},
                "gelu": {"model.activation": "gelu", "model.ffn_size": 258},
            },
            "seed": (1, 2, 3),
        }

An axis is a key of the config with its values, or any other name with labels and the keys that each label sets.
Every combination of the axes is a member, in the order of the axes, the last one fastest.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeGuard

from glm_jax.config import Experiment, by_key, files, recipe, with_changes
from glm_jax.config.fields import in_section, to_dict
from glm_jax.errors import UserError

# Keys that a program takes as arrays: the key of the initialisation, the batches, the learning rate, alpha.
ARRAY_KEYS = ("seed", "model_seed", "optimizer.peak_lr", "optimizer.min_lr", "optimizer.warmup_samples",
              "optimizer.decay", "optimizer.decay_samples", "optimizer.rewarm", "optimizer.stairs",
              "train.embedding_shrink.alpha", "train.embedding_shrink.history", "data.seed", "data.weights",
              "data.temperature", "data.instructions", "data.blanks")  # fmt: skip

# Members do without these: a member has one device, no operator, and steps of one size.
PLAIN_KEYS = {"mesh.data": 1, "mesh.pipeline": 1, "mesh.tensor": 1, "train.batch_ramp": (), "train.skip_steps": (),
              "train.spike.rollbacks": 0, "train.init_from": "", "train.evaluators": (),
              "interventions": ()}  # fmt: skip

TOGETHER = 32  # largest number of members of a group: memory holds all their states at once

Sweep = Mapping[str, Mapping[str, Mapping[str, object]]]  # axis -> label -> dotted key -> value


@dataclasses.dataclass(frozen=True)
class Member:
    """One run of a sweep.

    Attributes:
        name: made of the labels; its file has the same name.
        labels: axis -> label.
        changes: the dotted keys of the base that it sets.
        config: resolved.
    """

    name: str
    labels: Mapping[str, str]
    changes: Mapping[str, object]
    config: Experiment


@dataclasses.dataclass(frozen=True)
class Group:
    """Members that one program trains, named by the labels that they share."""

    name: str
    members: tuple[Member, ...]

    @property
    def steps(self) -> int:
        """Return the number of steps of each member."""
        return self.members[0].config.train.steps

    def to_json(self, workdir: Path) -> str:
        """Write the group as JSON for worker.py, which writes its results to `workdir`."""
        members = [
            {
                "name": member.name,
                "labels": dict(member.labels),
                "changes": dict(member.changes),
                "config": to_dict(member.config),
            }
            for member in self.members
        ]
        return json.dumps({"workdir": str(workdir), "group": self.name, "members": members}, default=dict)


def load(path: Path) -> Sweep:
    """Read the axes of an ablation's file.

    Raises:
        UserError: it has no `get_sweep`, or one that does not return axes.
    """
    otherwise = "it is an experiment for `glm-jax train`, not a sweep"
    axes = files.call(path, files.read(path), "get_sweep", otherwise)
    return read_axes(axes, str(path))


def read_axes(axes: object, where: str = "get_sweep()") -> Sweep:
    """Check the result of `get_sweep`, and write out every axis as labels and their keys.

    Raises:
        UserError: it is not a sweep as described at the top of this file.
    """
    if not isinstance(axes, Mapping) or not axes:
        raise UserError(f"{where}: get_sweep() returns {type(axes).__name__}, it must be a dict of axes, not empty")
    return {name: _read_axis(name, values, where) for name, values in axes.items()}


def _read_axis(name: object, values: object, where: str) -> dict[str, Mapping[str, object]]:
    if not _fits_a_file(name) or not isinstance(values, Mapping | list | tuple) or not values:
        raise UserError(f"{where}: the axis {name!r} is {values!r}: give it values, or labels with the keys they set")
    if isinstance(values, Mapping):
        for label, changes in values.items():
            if not isinstance(changes, Mapping) or not _fits_a_file(label):
                raise UserError(f"{where}: {name!r} has {label!r}: {changes!r}, it must be a label with keys to set")
        return {label: dict(changes) for label, changes in values.items()}
    labels = [_label(value) for value in values]
    if len(set(labels)) < len(labels) or not all(map(_fits_a_file, labels)):
        raise UserError(f"{where}: the values {values!r} of {name} repeat or cannot name a file: give labels and keys")
    return {label: {name: value} for label, value in zip(labels, values, strict=True)}


def _label(value: object) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _fits_a_file(label: object) -> TypeGuard[str]:
    return isinstance(label, str) and 0 < len(label) < 40 and not set(label) & set("/,= \n\0")


def expand(base: Experiment, sweep: Sweep) -> list[Member]:
    """Return all members of a sweep, with their configs checked.

    Args:
        base: resolved.
        sweep: from `load`.

    Raises:
        UserError: a key does not exist, a value is out of range, two axes set one key, or a sweep does not take a key.
    """
    short = _short_names(sweep)
    members = []
    for labels in itertools.product(*sweep.values()):
        chosen = dict(zip(sweep, labels, strict=True))
        name = ",".join(f"{short[axis]}={label}" for axis, label in chosen.items())
        changes: dict[str, object] = {}
        for axis, label in chosen.items():
            for key, value in sweep[axis][label].items():
                if key in changes:
                    raise UserError(f"the axis {axis} sets {key}, and so does one before it: leave it to one of them")
                changes[key] = value
        try:
            config = with_changes(base, changes)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
        _check_plain(name, config)
        members.append(Member(name, chosen, changes, config))
    return members


def _short_names(sweep: Mapping[str, object]) -> dict[str, str]:
    """Name each axis by the last part of its key, or by the whole key where last parts are alike."""
    last = [axis.rpartition(".")[2] for axis in sweep]
    return {axis: name if last.count(name) == 1 else axis for axis, name in zip(sweep, last, strict=True)}


def _check_plain(name: str, config: Experiment) -> None:
    found = by_key(config)
    for key, plain in PLAIN_KEYS.items():
        if found[key] != plain:
            raise UserError(f"{name}: {key} is {found[key]!r}, members of a sweep run with {plain!r}")
    try:
        config.check_sources()
    except UserError as error:
        raise UserError(f"{name}: {error}") from None


def program(config: Experiment) -> str:
    """Return all that a member's program depends on, as text; members with equal texts share a program.

    With dropout, its seed is part of the program.
    """
    drops = config.model.attention_dropout or config.model.hidden_dropout
    keys = {key: value for key, value in by_key(config).items() if not in_section(key, ARRAY_KEYS)}
    return json.dumps([keys, recipe.shrinks(config), config.params_seed if drops else None], sort_keys=True)


def group(members: Sequence[Member], together: int = TOGETHER) -> list[Group]:
    """Group members that one program can train, at most `together` each, in the order of their first members."""
    found: dict[str, list[Member]] = {}
    for member in members:
        found.setdefault(program(member.config), []).append(member)
    groups: list[Group] = []
    for alike in found.values():
        for start in range(0, len(alike), together):
            part = tuple(alike[start : start + together])
            groups.append(Group(_group_name(part, len(groups) + 1), part))
    return groups


def chosen(groups: Sequence[Group], only: str) -> list[Group]:
    """Return the groups with a member whose name has all labels of `only`, such as "num_layers=48,seed=1".

    Whole groups, so that a member is always trained beside the same others. An empty text takes all.

    Raises:
        UserError: there is none.
    """
    wanted = set(only.split(",")) if only else set[str]()
    found = [group for group in groups if any(wanted <= set(member.name.split(",")) for member in group.members)]
    if not found:
        name = groups[0].members[0].name
        raise UserError(f"--only {only}: no member has all of these labels; names are such as {name}")
    return found


def _group_name(members: Sequence[Member], number: int) -> str:
    first, *rest = members
    shared = [
        f"{short}={first.labels[axis]}"
        for axis, short in _short_names(first.labels).items()
        if all(member.labels[axis] == first.labels[axis] for member in rest)
    ]
    return f"{number:02d} " + (",".join(shared) or "all")
