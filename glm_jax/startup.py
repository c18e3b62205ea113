"""What a process of `glm-jax` sets before it loads jax: where compiled programs are kept, and how memory is freed."""

from __future__ import annotations

import contextlib
import ctypes
import glob
import hashlib
import os
import platform
import re
import warnings
from pathlib import Path
from typing import TextIO

from glm_jax.storage.files import user_cache

DIRECTORY = "JAX_COMPILATION_CACHE_DIR"  # jax's own variable, and so are those of OPTIONS
OPTIONS = {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}  # small programs are many
KEPT_BYTES = 2**30  # of compiled programs
FREE_MEMORY = "GLM_JAX_FREE_MEMORY"  # 1: give freed memory back to the system, as the C library does by default

_M_TRIM_THRESHOLD, _M_MMAP_MAX, _M_ARENA_MAX = -1, -4, -8  # malloc.h of glibc
_UNREADABLE = re.compile("Error reading persistent compilation cache entry for '(.*?)'")
_UNWRITABLE = "Error writing persistent compilation cache entry"


def prepare() -> None:
    """Set everything, unless the environment says otherwise. Call it before anything imports jax."""
    keep_memory()
    keep_programs()


def keep_memory() -> bool:
    """Let the process keep the memory that it frees, and return whether it does: with glibc alone, see FREE_MEMORY.

    XLA allocates its large arrays anew in every step. By default glibc returns each to the system, whose pages are then
    zeroed and mapped again. One arena for all threads, because arenas of other threads cannot hold large arrays.
    """
    if os.environ.get(FREE_MEMORY, "0") != "0" or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    settings = ((_M_TRIM_THRESHOLD, -1), (_M_MMAP_MAX, 0), (_M_ARENA_MAX, 1))
    return mallopt is not None and all([mallopt(name, value) for name, value in settings])


def keep_programs() -> None:
    """Keep compiled programs in the user's cache folder, if the environment does not name another (DIRECTORY).

    Of more than KEPT_BYTES those are removed that have not been used for longest. A folder that cannot be used, or an
    entry whose writer was killed, costs a compilation and no message.
    """
    try:
        folder = user_cache() / "compiled" / _processor()
    except RuntimeError:  # there is no home directory
        return
    if os.environ.setdefault(DIRECTORY, str(folder)) != str(folder):
        return
    for name, value in OPTIONS.items():
        os.environ.setdefault(name, value)
    _prune(folder)
    _repair(folder)


def _processor() -> str:
    """Return a name for what programs are compiled for: one made for another processor may not run on this one."""
    features = platform.machine()
    with contextlib.suppress(OSError), open("/proc/cpuinfo", encoding="utf-8") as file:
        features += next((line for line in file if re.match("flags|Features", line)), "")
    return hashlib.sha256(features.encode()).hexdigest()[:16]


def _prune(folder: Path) -> None:
    used = list[tuple[float, int, Path]]()
    for path in folder.glob("*-cache"):
        with contextlib.suppress(OSError):  # another process removes it, too
            status = path.stat()
            used.append((max(status.st_atime, status.st_mtime), status.st_size, path))
    total = 0
    for _, size, path in sorted(used, reverse=True):
        total += size
        if total > KEPT_BYTES:
            _remove(path)


def _repair(folder: Path) -> None:
    """Remove the entries that jax warns of: it compiles instead, but never replaces an entry that exists."""
    show = warnings.showwarning

    def act(
        message: Warning | str, category: type[Warning], filename: str, lineno: int,
        file: TextIO | None = None, line: str | None = None,
    ) -> None:  # fmt: skip
        if found := _UNREADABLE.match(str(message)):
            for path in folder.glob(f"{glob.escape(found[1])}-*-cache"):
                _remove(path)
        elif not str(message).startswith(_UNWRITABLE):
            show(message, category, filename, lineno, file, line)

    warnings.showwarning = act


def _remove(path: Path) -> None:
    with contextlib.suppress(OSError):
        path.unlink()
