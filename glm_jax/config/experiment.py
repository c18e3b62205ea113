"""An experiment: all sections, and how a hand-written ConfigDict becomes a frozen, checked `Experiment`.

An experiment's file defines `get_config()`, which starts from `default_config()` and changes some keys. Flags
(`--config.model.num_layers=4`) override it. `resolve` then fills in missing keys and checks everything. Nothing here
imports jax, so that `glm-jax config` answers at once.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, cast

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from glm_jax.config.data import BlankOptions, Data, InstructionSet, Source
from glm_jax.config.fields import (
    Definition,
    Key,
    Role,
    Section,
    build,
    definitions,
    entry_type,
    field,
    flatten,
    is_mapping,
    is_section,
    names,
    plain,
    section,
    shown,
    to_dict,
)
from glm_jax.config.model import GLMConfig, Model
from glm_jax.config.training import Mesh, Optimizer, Pipeline, Train
from glm_jax.errors import UserError
from glm_jax.types import Json

if TYPE_CHECKING:
    Config = Any  # its keys are attributes that no type checker knows: `resolve` checks them
else:
    Config = ConfigDict

Changes = Mapping[str, object]  # values by dotted key


@dataclass(frozen=True)
class Experiment(Section):
    """Everything that determines a run."""

    seed: int = field(
        1234, at_least=0, at_most=2**63 - 1, role="frozen", doc="seed of the initial params, dropout and data"
    )
    model_seed: int = field(
        -1, at_least=-1, at_most=2**63 - 1, role="frozen", doc="seed of the initial params and dropout; -1: `seed`"
    )
    model: Model = section(Model, role="frozen")
    data: Data = section(Data)
    mesh: Mesh = section(Mesh, role="operational")
    pipeline: Pipeline = section(Pipeline, role="operational")
    train: Train = section(Train)
    optimizer: Optimizer = section(Optimizer)
    interventions: tuple[tuple[int, Changes], ...] = field(
        (),
        role="operational",
        example=(33_600, {"train.embedding_shrink.alpha": 0.5}),
        doc='changes during the run: ((33_600, {"train.embedding_shrink.alpha": 0.5}),) holds after step 33,600',
    )

    @property
    def params_seed(self) -> int:
        """Return the seed of the initial params and of dropout."""
        return self.seed if self.model_seed < 0 else self.model_seed

    def __post_init__(self) -> None:
        super().__post_init__()
        model, data = self.model, self.data
        if model.position == "learned_2d" and 0 < model.max_length < data.seq_length:
            raise ValueError(
                f"model.max_length {model.max_length} is less than data.seq_length {data.seq_length}: "
                "raise it, or set it to 0"
            )
        for table in ("sources", "instructions"):
            for name, entry in getattr(data, table).items():
                if not entry.path and not entry.sample:
                    raise ValueError(f"data.{table}.{name} has neither path nor sample: give it one")
        self._check_interventions()

    def glm(self, pieces: int) -> GLMConfig:
        """Return the model for a tokenizer of `pieces` pieces.

        Raises:
            UserError: model.vocab_size is smaller.
        """
        return self.model.glm(pieces, self.data.seq_length)

    def check_sources(self) -> None:
        """Raise UserError if there is nothing to train on, or to make a tokenizer from."""
        data = self.data
        if data.sources:
            return
        if not data.instructions:
            raise UserError("data.sources is empty: name at least one corpus, as experiments/quickstart.py does")
        if not data.tokenizer.path and not self.train.init_from:
            raise UserError(
                "data.sources is empty, and data.instructions need a tokenizer: set data.tokenizer.path, name weights "
                "to begin with as train.init_from, or a corpus to train one on"
            )
        if not data.blanks.instruction and not data.blanks.history:
            raise UserError("data.sources is empty, and data.instructions have no share: set data.blanks.instruction=1")

    def blank_options(self) -> BlankOptions:
        """Return how blanks are drawn, given the model's positions."""
        return self.data.blanks.options(self.model.position == "learned_2d")

    def _check_interventions(self) -> None:
        """Check that every intervention names keys that may change, and leaves a valid config."""
        if not self.interventions:
            return
        bare = dataclasses.replace(self, interventions=())
        for step, changes in sorted(self.interventions, key=lambda pair: pair[0]):
            if step < 0:
                raise ValueError(f"interventions name step {step}: they take effect after a step, 0 is the start")
            for key in changes:
                if role(key) != "numbers":
                    raise ValueError(f"interventions at step {step} name {key}, which cannot change during a run")
            bare = with_changes(bare, changes)


def keys(
    kind: type[Section] = Experiment, prefix: str = "", role: Role = "numbers"
) -> Iterator[tuple[Definition, Role]]:
    """Yield the definition of every key, under its dotted name, and its role; table entries are called NAME."""
    for one in definitions(kind):
        own = one.key.role or role
        entry = entry_type(one.type)
        if entry is not None:
            yield from keys(entry, f"{prefix}{one.name}.NAME.", own)
        elif is_section(one.type):
            yield from keys(one.type, f"{prefix}{one.name}.", own)
        else:
            yield one._replace(name=f"{prefix}{one.name}"), own


def definition(key: str) -> Definition | None:
    """Return the definition of a dotted key, of a section or of an entry of a table by name; None if there is none."""
    found = Definition("", Experiment, None, Key(""))
    for name in key.split("."):
        entry = entry_type(found.type)
        inner = definitions(found.type) if is_section(found.type) else ()
        one = found._replace(type=entry) if entry and name else next((one for one in inner if one.name == name), None)
        if one is None:
            return None
        found = one
    return found._replace(name=key)


def role(key: str) -> Role:
    """Return the role of a dotted key; if there is no such key, the role of the section it would be in."""
    kind: object = Experiment
    found: Role = "numbers"
    for name in key.split("."):
        one = next((one for one in definitions(kind) if one.name == name), None) if is_section(kind) else None
        if one is None:
            entry = entry_type(kind)
            if entry is None:
                break
            kind = entry
            continue
        found, kind = one.key.role or found, one.type
    return found


def default_config() -> Config:
    """Return every key with its default, for an experiment's file to change. The default model fits a laptop."""
    return ConfigDict(to_dict(Experiment()))


def source(**changes: object) -> Config:
    """Return an entry of `data.sources`: the defaults with `changes`, which must include `path` or `sample`."""
    return ConfigDict(to_dict(Source()) | changes)


def instructions(**changes: object) -> Config:
    """Return an entry of `data.instructions`: the defaults with `changes`, which must include `path` or `sample`."""
    return ConfigDict(to_dict(InstructionSet()) | changes)


def resolve(config: Config | Mapping[str, object], changes: Changes = MappingProxyType({})) -> Experiment:
    """Fill in missing keys, and check every key, type and value.

    Args:
        config: the result of `get_config()`.
        changes: values by dotted key, in place of the config's.

    Raises:
        UserError: a key does not exist (the message suggests the nearest), or a value has the wrong type or is out of
            range.
    """
    values = plain(config)
    if not isinstance(values, dict):
        raise UserError(f"the config is {shown(config)}: let get_config() return default_config() with its changes")
    return build(Experiment, _changed(cast(Json, values), changes))


def with_changes(experiment: Experiment, changes: Changes) -> Experiment:
    """Return an experiment with the dotted keys of `changes` set; None removes a key of a table's entry, or the entry.

    Raises:
        UserError: a key does not exist, or a value is not valid for it.
    """
    values = _changed(to_dict(experiment), changes)
    for table in ("sources", "instructions"):
        entries: object = values["data"][table]
        if is_mapping(entries):  # without those of which all keys were removed
            values["data"][table] = {name: left for name, left in entries.items() if left}
    return build(Experiment, values)


def _changed(values: Json, changes: Changes) -> Json:
    """Change nested dicts by dotted key, as `with_changes` does, and return them."""
    for key, value in changes.items():
        *path, last = key.split(".")
        part = values
        for name in path:
            inner: object = part.setdefault(name, {})
            if not is_mapping(inner):
                raise UserError(f"unknown config key {key}: {key.rpartition('.')[0]} is not a section")
            part = cast(Json, inner)  # `to_dict` and `plain` make nothing but dicts
        in_table = key.startswith(("data.sources.", "data.instructions."))
        known = definition(key)
        if known is not None and is_section(known.type) and not in_table:
            raise UserError(f"{key} is a section: set its keys, such as {key}.{next(names(known.type))}")
        if value is not None:
            part[last] = plain(value)
        elif in_table:
            part.pop(last, None)
        else:
            raise UserError(f"{key} is None: give it a value, because only entries of a table can be removed")
    return values


def by_key(experiment: Experiment) -> dict[str, object]:
    """Return every value by dotted key, in order."""
    return dict(flatten(to_dict(experiment)))


def default_values(names: Mapping[str, Iterable[str]]) -> dict[str, object]:
    """Return every default by dotted key, including those of entries of data.sources and data.instructions.

    Args:
        names: the names of these entries, by "sources" and "instructions".
    """
    found = by_key(Experiment())
    for table, entry in (("sources", Source()), ("instructions", InstructionSet())):
        for name in names.get(table, ()):
            found |= flatten(to_dict(entry), f"data.{table}.{name}.")
    return found


def to_json(experiment: Experiment) -> str:
    """Write an experiment as the JSON of `config.json` in a workdir."""
    return json.dumps(to_dict(experiment), indent=2, ensure_ascii=False) + "\n"


def from_json(text: str) -> Experiment:
    """Read what `to_json` wrote; keys added since then get their defaults.

    Raises:
        ValueError: `text` is not a JSON object.
        UserError: a key does not exist, or a value is not valid for it.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    if not is_mapping(values):
        raise ValueError(f"{text[:80]!r} is not a JSON object")
    return resolve(values)
