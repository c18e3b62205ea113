"""The reference of all keys, made from their definitions; docs/configuration.md holds it."""

from __future__ import annotations

import typing
from collections.abc import Iterator, Mapping
from types import UnionType
from typing import Literal, Union

from glm_jax.config.experiment import keys
from glm_jax.config.fields import Definition

_TYPES: Mapping[object, str] = {int: "int", float: "float", bool: "bool", str: "text"}

_INTRODUCTION = """# Configuration

Every key of an experiment, with its default. `--config.KEY=VALUE` sets one on the command line, an experiment's
`get_config()` in a file. A workdir keeps its *frozen* keys; *operational* ones change how a run is carried out and
reported; a change of any other on the way is an intervention, which the run records. NAME stands for a name of yours.

This page is made by `glm-jax config keys`.
"""


def reference() -> Iterator[str]:
    """Yield the lines of the reference in Markdown, a table for each section."""
    yield from _INTRODUCTION.splitlines()
    sections: dict[str, list[str]] = {}
    for definition, role in keys():
        section, _, name = definition.name.rpartition(".")
        shown = "" if role == "numbers" else role
        cells = (f"`{name}`", f"`{definition.default!r}`", takes(definition), shown, definition.key.doc)
        sections.setdefault(section, []).append("| " + " | ".join(cells) + " |")
    for section, lines in sections.items():
        yield from ("", f"## {section or 'The experiment'}", "")
        yield from ("| key | default | takes | role | |", "|---|---|---|---|---|", *lines)


def takes(definition: Definition) -> str:
    """Describe the values of a key: its choices, or its type and range."""
    kind, key = definition.type, definition.key
    if typing.get_origin(kind) is Literal:
        return ", ".join(f"`{choice}`" for choice in typing.get_args(kind))
    if key.example is not None:
        return f"entries like `{key.example!r}`"
    bounds = key.bounds().removeprefix("be ").replace("not be negative", "from 0 up")
    return " ".join(filter(None, (_type_name(kind), bounds)))


def _type_name(kind: object) -> str:
    if typing.get_origin(kind) in (Union, UnionType):
        count = max(len(typing.get_args(one)) for one in typing.get_args(kind))
        return f"{count} whole numbers, or nothing"
    return _TYPES[kind]
