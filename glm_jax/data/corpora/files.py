"""Find the files of a corpus, and account for all that is not read."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_jax.data.corpora.records import Damaged
from glm_jax.errors import UserError
from glm_jax.storage.files import open_regular

_MAGIC = frozenset("*?[")


@dataclass(frozen=True)
class Found:
    """What a path names.

    Attributes:
        files: those that can be read, sorted. A file that several links lead to is there once.
        skipped: those that cannot be read, with the reason.
        left_out: files and folders whose names begin with a dot, and folders that a glob without ** matches; what is
            inside is not listed.
    """

    files: tuple[Path, ...]
    skipped: tuple[tuple[Path, Damaged], ...] = ()
    left_out: tuple[Path, ...] = ()

    def check(self) -> None:
        """Raise UserError for the first file that cannot be read, if there is one."""
        for file, damage in self.skipped:
            raise UserError(f"{file}: {damage.message}")


def find_files(path: str, what: str = "corpus") -> Found:
    """List the files that a source's `path` names. A folder and the glob folder/** name the same files.

    Links are followed, in a circle only once. Hidden files and folders are left out unless the path names them.

    Args:
        path: a file, a folder (searched to any depth) or a glob; a name with brackets is first taken literally.
        what: what the files hold, for messages.

    Raises:
        UserError: nothing of it can be read.
    """
    search = _Search()
    root = Path(path).expanduser()
    parts = ("**", "*") if root.is_dir() else ()
    if not os.path.lexists(root):
        parts = root.parts[bool(root.anchor) :]
        parts = (*parts, "*") if parts[-1:] == ("**",) else parts
        root = Path(root.anchor)
    matches = sorted(set(search.expand(root, parts)))
    files: list[Path] = []
    skipped = list(search.unreadable.items())
    known: set[tuple[int, int]] = set()
    for file in matches:
        try:
            with open_regular(file) as stream:
                place = os.fstat(stream.fileno())
        except OSError as error:
            skipped.append((file, _unreadable(file, error)))
            continue
        if (place.st_dev, place.st_ino) not in known:
            files.append(file)
        known.add((place.st_dev, place.st_ino))
    if not files:
        if skipped:
            raise UserError(f"{what} {path} has no file that can be read: {skipped[0][0]}: {skipped[0][1].message}")
        if root.is_dir() and parts == ("**", "*"):
            raise UserError(f"{what} {path} is a directory without files that are not hidden: put text there")
        raise UserError(f"{what} {path} does not exist: give a file, a directory or a glob")
    return Found(tuple(files), tuple(sorted(skipped, key=lambda one: one[0])), tuple(sorted(search.left_out)))


def _unreadable(file: Path, error: OSError) -> Damaged:
    said = error.strerror or str(error)
    if file.is_symlink() and not file.exists():
        return Damaged("dangling link", 1, f"a link to {os.readlink(file)}, which is not there: fix or remove it")
    return Damaged("unreadable file", 1, f"cannot be read ({said[:1].lower()}{said[1:]}): fix or remove it")


class _Search:
    """A walk through folders along the parts of a glob.

    Attributes:
        left_out: as in Found.
        unreadable: folders that cannot be listed.
    """

    def __init__(self) -> None:
        self.left_out: set[Path] = set()
        self.unreadable: dict[Path, Damaged] = {}
        self._seen: set[tuple[str, int]] = set()

    def expand(self, root: Path, parts: tuple[str, ...]) -> Iterator[Path]:
        """Yield the matches that are no folders."""
        waiting, deep = [(root, parts)], "**" in parts
        while waiting:
            path, parts = waiting.pop()
            if not parts:
                if not path.is_dir():
                    yield path
                elif not deep:
                    self.left_out.add(path)
                continue
            head, rest = parts[0], parts[1:]
            if not _MAGIC & set(head) or (head != "**" and os.path.lexists(path / head)):
                if os.path.lexists(path / head):
                    waiting.append((path / head, rest))
                continue
            if not path.is_dir() or (place := (os.path.realpath(path), len(parts))) in self._seen:
                continue
            self._seen.add(place)  # another way to the same folder has nothing new
            entries = self._list(path, head)
            if head == "**":
                waiting += [(entry, parts) for entry in entries]
                waiting.append((path, rest))
            else:
                waiting += [(entry, rest) for entry in entries]

    def _list(self, folder: Path, head: str) -> list[Path]:
        """List the entries of a folder that match `head`, in reverse order; for "**", the folders."""
        try:
            names = sorted(os.listdir(folder), reverse=True)
        except OSError as error:
            self.unreadable[folder] = _unreadable(folder, error)
            return []
        if head == "**":
            matches = [folder / name for name in names if (folder / name).is_dir()]
        else:
            matches = [folder / name for name in names if fnmatch.fnmatchcase(name, head)]
        if head.startswith("."):
            return matches
        self.left_out |= {path for path in matches if path.name.startswith(".")}
        return [path for path in matches if not path.name.startswith(".")]
