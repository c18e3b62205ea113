"""Results while they are being made, from which the same command resumes.

The first line says what the results depend on. Every other line has a number, such as that of a prompt, a tab, and its
result; results come in the order in which they were made.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.storage.files import appending, json_line
from glm_jax.workdir.checkpoint_folders import everyone

Header = Mapping[str, Mapping[str, object]]  # what results depend on, by group and name; values of JSON


class Journal:
    """A journal that is open for writing; other commands are kept out of it.

    Attributes:
        lines: the results that it held when it was opened, by their numbers.
    """

    def __init__(self, path: Path, header: Header, flag: str = "--output") -> None:
        """Open or begin a journal; `flag` says where it is.

        Raises:
            UserError: it cannot be written, another command writes it, or it has another header.
        """
        self._path, self._flag = path, flag
        try:
            self._file = open(path, "ab")  # noqa: SIM115 (closed by `close`)
        except OSError as error:
            raise UserError(f"{path} cannot be written ({error.strerror}): name another {flag}") from error
        try:
            self._lock()
            self.lines, size = read(path, header, flag)
            self._holds_results = bool(self.lines)
            with appending(self._path):
                self._file.truncate(size)  # a line that was cut off
                if size == 0:
                    self._write(json_line(header))
        except BaseException:
            self._file.close()
            raise

    def _lock(self) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(
                f"another command is writing {self._path}: wait for it, or name another {self._flag}"
            ) from error
        except OSError:  # no locks here, as on some network file systems
            return

    def add(self, results: Iterable[tuple[int, str]]) -> None:
        """Write the lines of results, with their numbers, and sync them to the disk.

        Raises:
            UserError: the disk refuses them.
        """
        with appending(self._path):
            self._write("".join(f"{number}\t{line}" for number, line in results))
        self._holds_results = True

    def _write(self, text: str) -> None:
        self._file.write(text.encode())
        self._file.flush()
        os.fsync(self._file.fileno())

    def close(self) -> None:
        """Close it; one without results is removed."""
        if not self._holds_results:
            self._path.unlink(missing_ok=True)
        with contextlib.suppress(OSError):  # a full disk was reported by `add`
            self._file.close()


def read(path: Path, header: Header, flag: str = "--output") -> tuple[dict[int, str], int]:
    """Return the results in a journal by number, and the bytes of its whole lines.

    Raises:
        UserError: it cannot be read, or has another header.
    """
    try:
        content = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): name another {flag}") from error
    size = content.rfind(b"\n") + 1
    if size == 0 and json_line(header).encode().startswith(content):  # empty, or its header was cut off
        return {}, 0
    damaged = UserError(f"{path} is no journal of this command, or is damaged: remove it, or name another {flag}")
    try:
        first, *rest = content[:size].decode().split("\n")[:-1]
        found = json.loads(first)
        numbered = [line.split("\t", 1) for line in rest]
        lines = {int(number): f"{line}\n" for number, line in numbered}
    except (ValueError, RecursionError):
        raise damaged from None
    if not isinstance(found, dict) or found.keys() != header.keys():
        raise damaged
    if other := _difference(found, json.loads(json_line(header))):
        raise UserError(f"{path} was begun with {other}: repeat the command as it was, or remove that file")
    return lines, size


def agreed(path: Path, header: Header, journal: Journal | None, flag: str = "--output") -> dict[int, str]:
    """Return what a journal holds, which all processes of a run must see alike; the first one has opened it.

    Raises:
        UserError: they do not.
    """
    everyone("")  # until the first process has opened the journal
    done = read(path, header, flag)[0] if journal is None else journal.lines
    if len(set(everyone(digest(sorted(done))))) > 1:
        raise UserError(f"the processes see different contents of {path}: put {flag} where all of them read it")
    return done


def digest(value: object) -> str:
    """Return the digest of a value of JSON."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


def _difference(found: Mapping[str, Mapping[str, object]], header: Header) -> str:
    """Return how the header of a journal differs from the one that is expected; empty if it does not."""
    for group, values in header.items():
        for name, value in values.items():
            if (before := found[group].get(name)) != value:
                return f"other {group}" if name == "digest" else f"{name} {before}, not {value}"
    return ""
