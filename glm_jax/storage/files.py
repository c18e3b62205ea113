"""Write files so that readers never see a half-written one."""

from __future__ import annotations

import contextlib
import errno
import io
import json
import math
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from glm_jax.errors import UserError


def user_cache() -> Path:
    """Return the folder of glm_jax in the user's cache folder: XDG_CACHE_HOME, else ~/.cache.

    Raises:
        RuntimeError: the user has no home directory.
    """
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "glm_jax"


def sync(path: Path) -> None:
    """Sync a file, or the names in a directory, to the disk: a rename survives a crash once its directory is synced."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def open_regular(path: Path) -> io.BufferedReader:
    """Open a file for reading; one that is not a regular file, such as a pipe or a device, is refused.

    Raises:
        OSError: as `open`, or it is no regular file. Opening a pipe could wait for ever, and a device may have no end.
    """
    stream = open(path, "rb", opener=_without_waiting)  # noqa: SIM115, the caller closes it
    if not stat.S_ISREG(os.fstat(stream.fileno()).st_mode):
        stream.close()
        raise OSError(errno.EINVAL, "Not a regular file", str(path))
    return stream


def _without_waiting(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NONBLOCK)


@contextlib.contextmanager
def appending(path: Path) -> Iterator[None]:
    """Report, as one line, a disk that refuses what a resumable command appends to a file inside the block.

    Raises:
        UserError: names the file and the reason.
    """
    try:
        yield
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room, and the same command resumes"
        ) from error


@contextlib.contextmanager
def open_atomic(path: Path) -> Iterator[IO[bytes]]:
    """Yield a file, open for writing and reading, that becomes `path` if the block ends without an error."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w+b") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):  # a signal came while it was renamed
            os.unlink(temporary)
        raise
    sync(path.parent)


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write `content` to `path` under a temporary name, fsync, and rename."""
    with open_atomic(path) as file:
        file.write(content.encode("utf-8") if isinstance(content, str) else content)


def json_line(value: object) -> str:
    """Return a value as a line of JSON; numbers that are not finite, which JSON lacks, become null."""
    return json.dumps(_finite(value), allow_nan=False) + "\n"


def _finite(value: object) -> object:
    if isinstance(value, dict):
        return {key: _finite(entry) for key, entry in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def check_absent(path: Path) -> None:
    """Check that a directory may be made at `path`.

    Raises:
        UserError: something is there already, other than an empty directory.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise UserError(f"{path} exists already: choose another directory or remove it")


@contextlib.contextmanager
def atomic_directory(path: Path) -> Iterator[Path]:
    """Yield a temporary directory that becomes `path` if the block ends without an error.

    If another process has made `path` in the meantime, that one stays: callers name directories by content.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for entry in (temporary, *temporary.rglob("*")):  # directories too, for the names in them
            if entry.is_file() or entry.is_dir():
                sync(entry)
        os.chmod(temporary, 0o755)
        try:
            os.replace(temporary, path)
        except OSError:
            if not path.is_dir():
                raise
        sync(path.parent)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
