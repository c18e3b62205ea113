"""Digests of a folder's files, stored beside them, so that no flipped bit on a disk goes unnoticed.

One or more processes seal a folder. Each lists the files it is responsible for in its own `digests-<i>-of-<n>.json`.
The folder is whole when all n lists exist and every listed file is unchanged. Unlisted files do not matter: whatever
reads a sealed folder finds its files through listed ones, and a stray file or an operator's note must not cost a good
checkpoint.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

from glm_jax.storage.files import sync, write_atomic

UNFINISHED = "was cut off while it was saved"
_LIST = re.compile(r"digests-(\d+)-of-(\d+)\.json")


class _Entry(TypedDict):
    """What a list says of one file."""

    bytes: int
    sha256: str


class _Damage(Exception):
    """What is wrong with a folder, worded to follow the folder's name."""


def files(folder: Path) -> list[str]:
    """List the files in and below `folder` as sorted relative paths, without the lists of digests."""
    paths = (path.relative_to(folder) for path in folder.rglob("*") if path.is_file())
    return sorted(path.as_posix() for path in paths if not _LIST.fullmatch(str(path)))


def seal(folder: Path, names: Iterable[str], index: int = 0, count: int = 1) -> None:
    """Sync the named files to the disk, then write their sizes and sha256 as list `index` of `count`.

    Raises:
        OSError: a file cannot be read, or the list cannot be written. No list is left behind.
    """
    entries: dict[str, _Entry] = {}
    parents = {folder}
    for name in names:
        with open(folder / name, "rb") as file:
            os.fsync(file.fileno())
            digest = hashlib.file_digest(file, "sha256").hexdigest()
            entries[name] = {"bytes": os.fstat(file.fileno()).st_size, "sha256": digest}
        parents.update(folder / parent for parent in Path(name).parents)
    for parent in parents:
        sync(parent)
    write_atomic(folder / f"digests-{index}-of-{count}.json", _render(entries))


def is_sealed(folder: Path) -> bool:
    """Whether all lists exist; the files they list are not checked."""
    try:
        return bool(_lists(folder))
    except (OSError, _Damage):
        return False


def stamp(folder: Path) -> str:
    """Return names, sizes and times of change of all files in and below a folder: equal stamps, unchanged files.

    Raises:
        OSError: a file cannot be examined.
    """
    found = sorted(path for path in folder.rglob("*") if path.is_file())
    states = ((path.relative_to(folder).as_posix(), path.stat()) for path in found)
    return "".join(f"{json.dumps([name, state.st_size, state.st_mtime_ns])}\n" for name, state in states)


def size(folder: Path) -> int:
    """Return the sum of the listed sizes of a sealed folder, in bytes."""
    return sum(entry["bytes"] for path in _lists(folder) for entry in _read(path).values())


def identity(folder: Path, under: str = "") -> str:
    """Return one sha256 of the files in and below a folder, names included; the files of a sealed one are not read.

    Args:
        folder: sealed or not.
        under: count only files whose relative path starts with this.

    Raises:
        OSError: a file cannot be read.
    """
    if is_sealed(folder):
        known = {name: entry["sha256"] for path in _lists(folder) for name, entry in _read(path).items()}
    else:
        known = {}
        for name in filter(lambda name: name.startswith(under), files(folder)):
            with open(folder / name, "rb") as file:
                known[name] = hashlib.file_digest(file, "sha256").hexdigest()
    counted = {name: digest for name, digest in known.items() if name.startswith(under)}
    return hashlib.sha256(json.dumps(counted, sort_keys=True).encode()).hexdigest()


def damage(folder: Path, under: str = "", index: int = 0, count: int = 1) -> str | None:
    """Return what is wrong with a folder, or None if everything checked is whole.

    Args:
        folder: sealed, or interrupted before it was.
        under: check only files whose relative path starts with this.
        index, count: check share `index` of `count` of those files. All lists are checked in any case.
    """
    try:
        entries: dict[str, _Entry] = {}
        for path in _lists(folder):
            entries |= _read(path)
        names = sorted(name for name in entries if name.startswith(under))
        if under and not names:
            return f"holds no {under.rstrip('/')}"
        for name in names[index::count]:
            _check(folder, name, entries[name])
    except _Damage as error:
        return str(error)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return None


def _lists(folder: Path) -> list[Path]:
    """Return the paths of all lists, one for each process that sealed the folder."""
    counts = {int(match[2]) for match in map(_LIST.fullmatch, os.listdir(folder)) if match}
    if not counts:
        raise _Damage(UNFINISHED)
    paths = [folder / f"digests-{index}-of-{max(counts)}.json" for index in range(max(counts))]
    for path in paths:
        if not path.exists():
            raise _Damage(f"{path.name} is missing")
    return paths


def _render(entries: dict[str, _Entry]) -> str:
    """Return the text of a list, with a digest of itself."""
    body = json.dumps(entries, sort_keys=True)
    return json.dumps({"sha256": hashlib.sha256(body.encode()).hexdigest(), "files": entries}, indent=1) + "\n"


def _read(path: Path) -> dict[str, _Entry]:
    """Read a list. It must match what `_render` wrote to the last byte: a corrupted name would hide a file."""
    content = path.read_bytes()
    try:
        entries: dict[str, _Entry] | None = json.loads(content)["files"]
    except (ValueError, KeyError, TypeError, RecursionError):  # ValueError: neither JSON nor UTF-8
        entries = None
    if not isinstance(entries, dict) or _render(entries).encode() != content:
        raise _Damage(f"{path.name} " + ("differs from its digest" if content.endswith(b"}\n") else "is cut short"))
    return entries


def _check(folder: Path, name: str, entry: _Entry) -> None:
    try:
        with open(folder / name, "rb") as file:
            if os.fstat(file.fileno()).st_size < entry["bytes"]:
                raise _Damage(f"{name} is cut short")
            digest = hashlib.file_digest(file, "sha256").hexdigest()
    except FileNotFoundError as error:
        raise _Damage(f"{name} is missing") from error
    except OSError as error:
        raise _Damage(f"{name} cannot be read ({error.strerror})") from error
    if digest != entry["sha256"]:
        raise _Damage(f"{name} differs from its digest")
