"""The sheet of accelerators: peak, memory, links and power, as their vendors give them."""

from __future__ import annotations

import dataclasses
import functools
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.errors import UserError

OWN = Path(__file__).with_name("device_sheet.toml")


@dataclasses.dataclass(frozen=True)
class Gpu:
    """What XLA's compiler wants to know of a GPU that is not present. It guides choices; nothing is run."""

    name: str
    capability: tuple[int, int]
    cores: int  # streaming multiprocessors
    units: int  # float32 units a core
    threads: int  # a core, at most
    shared: int  # bytes of shared memory a core
    cache: int  # bytes of L2
    clock: float  # GHz


@dataclasses.dataclass(frozen=True)
class Device:
    """One kind of accelerator; device_sheet.toml says what each number is."""

    name: str
    kinds: tuple[str, ...]
    peak: float
    memory: int
    bandwidth: float
    link: float
    source: str
    network: float | None = None
    node: int | None = None
    watts: float | None = None
    gpu: Gpu | None = None
    topology: str | None = None


@functools.cache
def sheet(path: Path = OWN) -> Mapping[str, Device]:
    """Return the devices of a sheet by name.

    Raises:
        UserError: the file cannot be read, is not TOML, or an entry lacks a number, has one that is not a positive
            number, or one that no device has.
    """
    try:
        tables = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: cannot be read ({error})") from None
    except tomllib.TOMLDecodeError as error:
        raise UserError(f"{path}: not TOML ({error})") from None
    return {name: _device(path, name, table) for name, table in tables.items()}


def find(name: str, *paths: Path) -> Device:
    """Return the device of that name, from the files given or else from our own sheet.

    Raises:
        UserError: none has that name, or a file is wrong, see `sheet`.
    """
    known: dict[str, Device] = {}
    for path in (OWN, *paths):
        known |= sheet(path)
    if name not in known:
        raise UserError(f"no device is named {name!r}: there are {', '.join(known)}, or add one (docs/planning.md)")
    return known[name]


def of_kind(kind: str) -> Device | None:
    """Return the device to which jax gives the name `kind`, or None if the sheet has none."""
    fitting = [
        (len(start), name) for name, device in sheet().items() for start in device.kinds if kind.startswith(start)
    ]
    return sheet()[max(fitting)[1]] if fitting else None


def _device(path: Path, name: str, table: Any) -> Device:
    """Return one entry of a sheet, checked."""
    where = f"{path}: [{name}]"
    values = _values(where, table, Device, {"name": name})
    if "gpu" in values:
        gpu = _values(f"{path}: [{name}.gpu]", values["gpu"], Gpu, {})
        if [type(part) for part in gpu["capability"]] != [int, int]:
            raise UserError(f"{path}: [{name}.gpu] capability must be two whole numbers, such as [8, 0]")
        gpu["capability"] = tuple(gpu["capability"])
        values["gpu"] = Gpu(**gpu)
    if not all(isinstance(kind, str) for kind in values["kinds"]):
        raise UserError(f"{where} kinds must be texts")
    values["kinds"], values["memory"] = tuple(values["kinds"]), int(values["memory"])
    return Device(**values)


# what a field's type, without None, takes from TOML, and the word for it
TAKES: Mapping[str, tuple[type | tuple[type, ...], str]] = {
    "str": (str, "a text"),
    "int": ((int, float), "a number"),
    "float": ((int, float), "a number"),
    "Gpu": (dict, "a table"),
    "tuple[str, ...]": (list, "a list of texts"),
    "tuple[int, int]": (list, "a list of two whole numbers"),
}


def _values(where: str, table: Any, kind: type, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the values of a table for the fields of a dataclass, with those given."""
    if not isinstance(table, dict):
        raise UserError(f"{where} must be a table of numbers")
    fields = {field.name: field for field in dataclasses.fields(kind)}
    values = {**table, **given}
    for key in values:
        if key not in fields:
            raise UserError(f"{where} has {key!r}, which no device has: {', '.join(fields)}")
    for key, field in fields.items():
        if key not in values:
            if field.default is dataclasses.MISSING:
                raise UserError(f"{where} lacks {key}")
            continue
        value, (takes, word) = values[key], TAKES[str(field.type).removesuffix(" | None")]
        if isinstance(value, bool) or not isinstance(value, takes):
            raise UserError(f"{where} {key} must be {word}, not {value!r}")
        if isinstance(value, int | float) and not 0 < value < float("inf"):
            raise UserError(f"{where} {key} must be a positive number, not {value}")
    return values
