"""One definition for each key of a config: type, default, range, help text and role, in one line of a dataclass.

A section is a frozen dataclass that inherits from `Section`. Its fields are made with `field` (a key) or `section` (a
nested section). The checks of values, the conversion of values from files and flags, and the reference of keys follow
from these definitions.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import math
import os
import re
import typing
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import UnionType
from typing import Literal, NamedTuple, TypeGuard, TypeVar, Union, cast

from ml_collections import ConfigDict  # pyright: ignore[reportMissingTypeStubs]

from glm_jax.errors import UserError
from glm_jax.types import Json

# frozen: fixed once the workdir exists. operational: how a run is executed and reported; changes its numbers by
# rounding at most. numbers: everything else; a run may resume with another value, which is then recorded.
Role = Literal["frozen", "operational", "numbers"]

T = TypeVar("T")

LARGEST = 2**31 - 1  # of whole numbers without another limit: sizes and steps are int32 on devices
LONGEST = 200  # characters of a value in a message


@dataclass(frozen=True)
class Key:
    """What a key may hold, beyond its type.

    Attributes:
        doc: a description in one line, with units.
        role: None to take the role of the section that holds the key.
        above, at_least, at_most, below: bounds of a number.
        example: a valid entry of a tuple, for messages.
        path: whether a text names a file or a folder; ~ is expanded.
    """

    doc: str
    role: Role | None = None
    above: float | None = None
    at_least: float | None = None
    at_most: float | None = None
    below: float | None = None
    example: object = None
    path: bool = False

    def bounds(self) -> str:
        """Describe the range; empty without bounds."""
        if self.at_least == 0 and self.at_most is None and self.below is None:
            return "not be negative"
        if self.at_least is not None and self.at_most is not None:
            return f"be from {_shown(self.at_least)} to {_shown(self.at_most)}"
        pairs = (("at least", self.at_least), ("above", self.above), ("at most", self.at_most), ("below", self.below))
        words = " and ".join(f"{word} {_shown(bound)}" for word, bound in pairs if bound is not None)
        return f"be {words}" if words else ""

    def holds(self, value: float) -> bool:
        """Whether `value` is within the bounds."""
        return (
            (self.above is None or value > self.above)
            and (self.at_least is None or value >= self.at_least)
            and (self.at_most is None or value <= self.at_most)
            and (self.below is None or value < self.below)
        )


def _shown(bound: float) -> str:
    power = int(bound).bit_length()
    return f"2**{power} - 1" if power > 30 and bound == 2**power - 1 else f"{bound:g}"


def field(
    default: T,
    *,
    doc: str,
    role: Role | None = None,
    above: float | None = None,
    at_least: float | None = None,
    at_most: float | None = None,
    below: float | None = None,
    example: object = None,
    path: bool = False,
) -> T:
    """Define a key of a section; see `Key`. Choices come from a Literal in the field's type.

    To a type checker, the result is the default itself.
    """
    key = Key(doc, role, above, at_least, at_most, below, example, path)
    return dataclasses.field(default=default, metadata={"key": key})


def section(factory: Callable[[], T], *, doc: str = "", role: Role | None = None) -> T:
    """Define a nested section, or a table of sections by name (`factory` is dict)."""
    return dataclasses.field(default_factory=factory, metadata={"key": Key(doc, role)})


class Definition(NamedTuple):
    """A key with everything known about it; `type` is its evaluated annotation."""

    name: str
    type: object
    default: object
    key: Key


@functools.cache
def definitions(kind: type) -> tuple[Definition, ...]:
    """Return the fields of a section, in order."""
    hints = typing.get_type_hints(kind)
    return tuple(
        Definition(
            one.name,
            hints[one.name],
            one.default_factory() if one.default_factory is not dataclasses.MISSING else one.default,
            one.metadata["key"],
        )
        for one in dataclasses.fields(kind)
        if "key" in one.metadata
    )


@dataclass(frozen=True)
class Section:
    """A frozen group of keys.

    Raises:
        ValueError: a number is out of range or not finite, or a value is not one of its choices.
    """

    def __post_init__(self) -> None:
        for name, kind, _, key in definitions(type(self)):
            problem = _problem(getattr(self, name), kind, key)
            if problem:
                raise ValueError(f"{name} is {shown(getattr(self, name))}, it must {problem}")


def _problem(value: object, kind: object, key: Key) -> str:
    """Return the requirement that a value fails, such as "be at least 1"; empty if it is valid."""
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        known = any(type(value) is type(choice) and value == choice for choice in choices)
        return "" if known else f"be one of {', '.join(map(str, choices))}"
    if isinstance(value, float) and not math.isfinite(value):
        return "be a finite number"
    if isinstance(value, int | float) and not isinstance(value, bool) and not key.holds(value):
        return key.bounds()
    if type(value) is int and key.at_most is None and abs(value) > LARGEST:
        return f"be at most {_shown(LARGEST)}"
    if isinstance(value, str):
        return path_problem(value) if key.path else _text_problem(value)
    return ""


def _text_problem(text: str) -> str:
    return "be valid UTF-8" if any("\ud800" <= character <= "\udfff" for character in text) else ""


def path_problem(path: str) -> str:
    """Return the requirement that the name of a file or folder fails, such as "be valid UTF-8"; empty if it is valid.

    Whether the file exists is another question.
    """
    if re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", path):
        return "name a file or folder of this machine: URLs and object stores cannot be read"
    return "not have a null character" if "\0" in path else _text_problem(path)


def local_path(path: str | Path, what: str) -> Path:
    """Return the path of a file or folder, with ~ expanded.

    Raises:
        UserError: it cannot be one; the line calls it `what`.
    """
    if problem := path_problem(str(path)):
        raise UserError(f"{what} is {shown(str(path))}, it must {problem}")
    return Path(os.path.expanduser(path))


def is_section(kind: object) -> TypeGuard[type[Section]]:
    """Whether a type is a section."""
    return isinstance(kind, type) and issubclass(kind, Section)


def entry_type(kind: object) -> type[Section] | None:
    """Return the section that a table by name holds, or None for any other type."""
    arguments = typing.get_args(kind)
    return arguments[1] if len(arguments) == 2 and is_section(arguments[1]) else None


def is_mapping(value: object) -> TypeGuard[Mapping[str, object]]:
    """Whether a value is a mapping by name."""
    return isinstance(value, Mapping) and all(isinstance(name, str) for name in cast(Mapping[object, object], value))


def plain(value: object) -> object:
    """Return a value with nested dicts in place of the mappings and ConfigDicts in it."""
    if isinstance(value, ConfigDict):
        value = cast(object, value.to_dict())  # pyright: ignore[reportUnknownMemberType]
    return {name: plain(inner) for name, inner in value.items()} if is_mapping(value) else value


def shown(value: object) -> str:
    """Return a value for a message: as Python writes it, in one line, and not too long."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a class of the user's, or a whole number of more than 4300 digits
        text = f"a value of type {type(value).__name__}"
    return text if len(text) <= LONGEST else f"{text[:LONGEST]}..."


def is_list(value: object) -> TypeGuard[Sequence[object]]:
    """Whether a value is a list or a tuple."""
    return isinstance(value, list | tuple)


def flatten(values: Mapping[str, object], prefix: str = "") -> Iterator[tuple[str, object]]:
    """Yield (dotted key, value) for every leaf of nested mappings, in order."""
    for name, value in values.items():
        if is_mapping(value):
            yield from flatten(value, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}", value


def in_section(key: str, sections: tuple[str, ...]) -> bool:
    """Whether a dotted key is one of `sections` or is inside one."""
    return any(key == name or key.startswith(f"{name}.") for name in sections)


def to_dict(values: Section) -> Json:
    """Return a section as the nested dicts that `build` takes."""

    def plain(value: object) -> object:
        if isinstance(value, Section):
            return to_dict(value)
        return {name: plain(inner) for name, inner in value.items()} if is_mapping(value) else value

    return {name: plain(getattr(values, name)) for name, _, _, _ in definitions(type(values))}


def closest(key: str, known: list[str], listing: str = "config show --config NAME") -> str:
    """Return a suggestion: the known key that was probably meant, or the command that lists all of them."""
    last = re.split(r"[./]", key)[-1]
    same = [one for one in known if re.split(r"[./]", one)[-1] == last]  # right but for its section or folder
    matches = difflib.get_close_matches(key, same, n=1, cutoff=0) or difflib.get_close_matches(
        key, known, n=1, cutoff=0.5
    )
    if matches:
        return f"did you mean {matches[0]}?"
    return f"`glm-jax {listing}` lists all of them"


S = TypeVar("S", bound=Section)


def build(kind: type[S], values: Mapping[str, object], where: str = "", known: list[str] | None = None) -> S:
    """Build a section from nested mappings; missing keys keep their defaults.

    Args:
        kind: the section.
        values: by name, as read from files, flags and JSON.
        where: the dotted prefix of the section's keys, for messages.
        known: all dotted keys that exist, for suggestions; by default those of `kind`.

    Raises:
        UserError: a key does not exist (the message suggests the nearest), or a value has another type or is out of
            range.
    """
    known = [f"{where}{name}" for name in names(kind)] if known is None else known
    fields = {one.name: one for one in definitions(kind)}
    made: dict[str, object] = {}
    for name, value in values.items():
        key = f"{where}{name}"
        if name not in fields:
            unknown = next((inner for inner, _ in flatten({key: value})), key)
            raise UserError(f"unknown config key {unknown}: {closest(unknown, known)}")
        one = fields[name]
        entry = entry_type(one.type)
        if entry is None and not is_section(one.type):
            made[name] = convert(key, value, one.type, one.key, one.default)
        elif not is_mapping(value):
            raise UserError(f"{key} is {shown(value)}: it is a section, set its keys")
        elif entry is not None:
            made[name] = {label: _table_entry(entry, keys, f"{key}.{label}") for label, keys in value.items()}
        elif is_section(one.type):
            made[name] = build(one.type, value, f"{key}.", known)
    try:
        return kind(**made)
    except ValueError as error:
        raise UserError(f"{where}{error}") from None


def _table_entry(kind: type[Section], keys: object, where: str) -> Section:
    name = where.rpartition(".")[2]
    if not name.isprintable() or not name:
        raise UserError(f"{where} has no usable name: choose one of letters, digits, - and _")
    if not is_mapping(keys):
        raise UserError(f"{where} is {shown(keys)}: give it keys, such as path and weight")
    return build(kind, keys, f"{where}.")


def names(kind: type) -> Iterator[str]:
    """Yield the dotted names of all keys of a section, except those in tables by name."""
    for name, inner, _, _ in definitions(kind):
        if is_section(inner):
            yield from (f"{name}.{deeper}" for deeper in names(inner))
        elif entry_type(inner) is None:
            yield name


def convert(where: str, value: object, kind: object, key: Key, default: object) -> object:
    """Return `value` converted to the type `kind`: an int is accepted for a float, a list for a tuple.

    Raises:
        UserError: it has another type.
    """
    origin = typing.get_origin(kind)
    if kind is object or (origin is Literal and type(value) in {type(one) for one in typing.get_args(kind)}):
        return value
    if origin in (tuple, Union, UnionType) and is_list(value):
        return _convert_tuple(where, value, kind, key)
    if kind is float and type(value) is int:
        try:
            return float(value)
        except OverflowError:
            return math.copysign(math.inf, value)  # which is refused as any infinity is
    if type(value) is not kind:
        example = default if key.example is None else (key.example,)
        raise UserError(f"{where} is {shown(value)}, it must be of type {type(default).__name__} (such as {example!r})")
    return os.path.expanduser(value) if key.path and isinstance(value, str) else value


def _convert_tuple(where: str, value: Sequence[object], kind: object, key: Key) -> tuple[object, ...]:
    if typing.get_origin(kind) is not tuple:  # a fixed count of numbers, or none: tuple[int, int] | tuple[()]
        count = max(len(typing.get_args(one)) for one in typing.get_args(kind))
        if value and (len(value) != count or any(type(entry) is not int for entry in value)):
            raise UserError(f"{where} is {shown(value)}, it must hold {count} whole numbers, or nothing")
        return tuple(_valid(where, entry, int, _UNBOUNDED) for entry in value)
    inner = typing.get_args(kind)[0]
    if inner in (str, int):
        return tuple(_valid(where, entry, inner, key) for entry in value)
    return tuple(_convert_pair(where, entry, inner, key) for entry in value)


def _convert_pair(where: str, entry: object, kind: object, key: Key) -> tuple[object, object]:
    """Convert a pair: a whole number or a text, then a number or a mapping by name."""
    opening, second = typing.get_args(kind)
    if is_list(entry) and len(entry) == 2 and type(entry[0]) is opening:
        first, inner = _valid(where, entry[0], opening, _UNBOUNDED), entry[1]
        if typing.get_origin(second) is not None:
            if is_mapping(inner):
                of = typing.get_args(second)[1]
                return first, {name: _valid(f"{where} of {name}", one, of, key) for name, one in inner.items()}
        elif type(inner) in (int, second):
            return first, _valid(where, inner, second, key)
    raise UserError(f"{where} holds {shown(entry)}: its entries are pairs such as {key.example!r}")


_UNBOUNDED = Key("a number in a tuple")


def _valid(where: str, value: T, kind: object, key: Key) -> T:
    """Return a value in a tuple, converted to its type and checked."""
    default = "a name" if kind is str else 0 if kind is int else 0.0
    converted = convert(where, value, kind, key, default)
    if problem := _problem(converted, kind, key):
        raise UserError(f"{where} holds {shown(value)}, it must {problem}")
    return cast(T, converted)
