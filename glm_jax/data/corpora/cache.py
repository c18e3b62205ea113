"""The cache: stages that appear whole, are sealed with digests, and are made again when they are damaged.

A stage is a directory `<stage>/<key>/`, named by everything that its content depends on. It is built under a hidden
name beside its own, piece by piece. A piece appears whole or not at all; once all exist, the directory is sealed and
takes its name. A new build reuses the pieces of a killed one. A lock keeps two processes from making the same directory
at once.

    locks/<stage>-<key>      held while the stage is made
    checked/<stage>-<key>    sizes and times of its files when they last matched their digests
    runs                     how often the cache was used
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from glm_jax.data.corpora.build import WorkerDied
from glm_jax.errors import UserError
from glm_jax.storage import digests
from glm_jax.storage.files import sync, user_cache, write_atomic

Report = Callable[[str], None]

STAGES = ("text", "documents", "tokenizers", "shards", "instructions", "tasks")
COMPARE_EVERY = 100  # runs
TEMPORARY = "."  # prefix of the names of unfinished pieces (files.atomic_directory)


@dataclass(frozen=True)
class Cache:
    """The cache's root directory, and how to use it.

    Attributes:
        report: called with one line for each stage, and for each that is damaged.
        compare: whether to compare the content of every file with its digest. Otherwise a file is taken to be whole if
            its size and its time of change are those it had when it was last compared.
    """

    root: Path
    report: Report
    compare: bool = False

    def made(self, stage: str, key: str, make: Callable[[Path], None]) -> tuple[Path, bool]:
        """Make the directory `stage/key` unless it exists and is whole.

        Args:
            stage: one of STAGES.
            key: of the content, so that an existing directory is right.
            make: fills an unfinished directory, which may hold pieces finished by a killed build.

        Returns:
            The directory, and whether it already existed.

        Raises:
            UserError: `make` raised it, and nothing is left behind unless a worker died; or the cache cannot be
                written. A damaged directory stays until its successor is finished.
        """
        directory = self.root / stage / key
        with _refusals(directory):
            if directory.is_dir() and self.damage(directory) is None:
                return directory, True
            with _lock(self.root / "locks" / f"{stage}-{key}"):
                damage = self.damage(directory) if directory.is_dir() else ""
                if damage is None:
                    return directory, True
                if damage:
                    self.report(f"{directory} is damaged ({damage}): it is made again from its source")
                self._make(directory, make, damage)
        return directory, False

    def _make(self, directory: Path, make: Callable[[Path], None], damage: str) -> None:
        building = directory.parent / f".{directory.name}.building"
        building.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(building)
        try:
            make(building)
        except WorkerDied:
            raise
        except UserError as error:
            shutil.rmtree(building)
            if damage:
                raise UserError(f"{directory} is damaged ({damage}) and cannot be made again: {error}") from error
            raise
        _remove_temporaries(building)
        digests.seal(building, digests.files(building))
        if damage:
            aside = directory.parent / f".{directory.name}.damaged"
            shutil.rmtree(aside, ignore_errors=True)
            os.replace(directory, aside)
            shutil.rmtree(aside, ignore_errors=True)
        os.replace(building, directory)
        sync(directory.parent)
        remember(self._memory(directory), digests.stamp(directory))

    def damage(self, directory: Path) -> str | None:
        """Return what is wrong with a stage's directory, worded to follow its name, or None if it is whole."""
        memory = self._memory(directory)
        try:
            stamp = digests.stamp(directory)
        except OSError as error:
            return f"cannot be read ({error.strerror})"
        if not self.compare and recall(memory) == stamp:
            return None
        if damage := digests.damage(directory):
            memory.unlink(missing_ok=True)  # until it is made again, no run may take it to be whole
        else:
            remember(memory, stamp)
        return damage

    def verify(self) -> None:
        """Compare all stages with their digests, and report each that is damaged.

        Raises:
            UserError: some are.
        """
        found = [path for stage in STAGES for path in sorted((self.root / stage).glob("[!.]*")) if path.is_dir()]
        damages = {path: Cache(self.root, self.report, compare=True).damage(path) for path in found}
        damaged = {path: damage for path, damage in damages.items() if damage}
        for path, damage in damaged.items():
            self.report(f"{path} is damaged: {damage}")
        size = sum((path / name).stat().st_size for path in found for name in digests.files(path))
        self.report(f"cache {self.root}: {len(found)} stages, {size / 1e6:,.1f} MB, {len(damaged)} damaged")
        if damaged:
            raise UserError(
                f"{len(damaged)} of {len(found)} stages in {self.root} are damaged: `glm-jax corpus build` makes those "
                "that its config needs again, remove the others"
            )

    def _memory(self, directory: Path) -> Path:
        return self.root / "checked" / f"{directory.parent.name}-{directory.name}"


def cache_directory(configured: str) -> Path:
    """Make and return config.data.cache, or glm_jax in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Raises UserError if it cannot be made or written to.
    """
    try:
        cache = Path(configured).expanduser() if configured else user_cache()
    except RuntimeError:
        named = configured or "~/.cache"
        raise UserError(f"the cache {named} has no home directory to be in: set data.cache, or HOME") from None
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache {cache} ({error.strerror}): set data.cache") from None
    if not os.access(cache, os.W_OK):
        raise UserError(f"cannot write to the cache {cache}: set data.cache")
    return cache


def open_cache(configured: str, report: Report) -> Cache:
    """Open the cache for a run, every COMPARE_EVERY-th time with a comparison of all files that the run uses.

    Raises UserError if it cannot be made or written to.
    """
    root = cache_directory(configured)
    try:
        runs = int(recall(root / "runs") or "0") + 1
    except ValueError:  # damaged: the count starts again
        runs = 1
    remember(root / "runs", str(runs))
    compare = runs % COMPARE_EVERY == 0
    if compare:
        report(f"cache {root}: used {runs:,} times, so all files are compared with their digests")
    return Cache(root, report, compare)


def recall(memory: Path) -> str | None:
    """Return what `remember` wrote to a file, or None if there is none that can be read. It may be damaged."""
    try:
        return memory.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return None


def remember(memory: Path, text: str) -> None:
    """Write a text to a file, if possible: what is remembered only saves time."""
    with contextlib.suppress(OSError):
        write_atomic(memory, text)


@contextlib.contextmanager
def _refusals(directory: Path) -> Iterator[None]:
    """Turn what the system refuses while a directory is made into one line."""
    try:
        yield
    except BrokenPipeError:  # nobody reads our output any more
        raise
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise UserError(
                f"no room for {directory} ({error.strerror}): make room, or set data.cache; finished pieces are kept"
            ) from error
        place = error.filename or directory
        raise UserError(
            f"{place} cannot be used to make {directory} ({error.strerror}): let this user read and write it, or set "
            "data.cache"
        ) from error


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Hold the lock at `path`, waiting for other processes that do. It is released when its process ends."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _remove_temporaries(directory: Path) -> None:
    for path in list(directory.rglob(f"{TEMPORARY}*")):
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)
