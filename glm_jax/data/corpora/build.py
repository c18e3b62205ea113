"""Builds that may be killed at any moment and resume: directories made in pieces, by several processes.

A directory is built under a hidden name beside its own, piece by piece. A piece appears whole or not at all, and the
directory takes its name once all pieces exist. A new build reuses the pieces of a killed one. A lock keeps two
processes from making the same directory at once.
"""

from __future__ import annotations

import concurrent.futures
import contextlib
import errno
import fcntl
import multiprocessing
import os
import shutil
import signal
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Self, TypeVar

from tqdm import tqdm

from glm_jax.errors import UserError
from glm_jax.storage.files import sync

Job = TypeVar("Job")
Result = TypeVar("Result")

TEMPORARY = "."  # prefix of the names of unfinished pieces (files.atomic_directory)


class WorkerDied(UserError):
    """A worker process was killed, for example by the system when memory ran out."""


def made(directory: Path, make: Callable[[Path], None]) -> bool:
    """Make `directory` unless it exists.

    Args:
        directory: named by its content, so that an existing one is right.
        make: fills an unfinished directory, which may hold pieces finished by a killed build.

    Returns:
        Whether it already existed.

    Raises:
        UserError: `make` raised it, and nothing is left behind unless a worker died; or the disk is full.
    """
    if directory.is_dir():
        return True
    building = directory.parent / f".{directory.name}.building"
    with _lock(directory.parent.parent / "locks" / f"{directory.parent.name}-{directory.name}"):
        if directory.is_dir():
            return True
        building.mkdir(parents=True, exist_ok=True)
        _remove_temporaries(building)
        try:
            make(building)
        except WorkerDied:
            raise
        except UserError:
            shutil.rmtree(building)
            raise
        except OSError as error:
            if error.errno not in (errno.ENOSPC, errno.EDQUOT):
                raise
            raise UserError(
                f"no room for {directory} ({error.strerror}): make room, or set data.cache; finished pieces are kept"
            ) from None
        _remove_temporaries(building)
        sync(building)
        os.replace(building, directory)
        sync(directory.parent)
    return False


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


class Workers:
    """Processes that share jobs; a `count` of 1 runs jobs in this one. They start when first needed."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._alive: Connection | None = None  # the workers hold the other end, which reports our exit

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def _start(self) -> concurrent.futures.ProcessPoolExecutor:
        if self._executor is None:
            context = multiprocessing.get_context("spawn")  # forking a process that has threads is unsafe
            reader, self._alive = context.Pipe(duplex=False)
            self._executor = concurrent.futures.ProcessPoolExecutor(self._count, context, _start_worker, (reader,))
        return self._executor

    def _stop(self) -> None:
        """End the processes at once, whatever they are doing."""
        if self._executor is not None and self._alive is not None:
            self._alive.close()
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def run(self, what: str, work: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int]) -> list[Result]:
        """Run `work` on each job, with a progress bar on a terminal.

        Args:
            what: the bar's label.
            work: a function that other processes can import.
            jobs: its arguments, picklable.
            sizes: bytes that each job stands for.

        Returns:
            The results in the order of the jobs.

        Raises:
            WorkerDied: a process was killed.
            Exception: raised by the first job, in their order, that fails.
        """
        results: list[Result] = []
        with tqdm(total=sum(sizes), desc=what, unit="B", unit_scale=True, leave=False, disable=None) as bar:
            for result, size in zip(self._results(work, jobs), sizes, strict=True):
                results.append(result)
                bar.update(size)
        return results

    def _results(self, work: Callable[[Job], Result], jobs: Sequence[Job]) -> Iterator[Result]:
        if self._count == 1 or len(jobs) < 2:
            yield from map(work, jobs)
            return
        executor = self._start()
        try:
            for future in [executor.submit(work, job) for job in jobs]:
                yield future.result()
        except BrokenProcessPool:
            self._stop()
            raise WorkerDied(
                "a worker process was killed, perhaps because memory ran out: run the same command with fewer "
                "--workers; it resumes from what is finished"
            ) from None
        except BaseException:
            self._stop()
            raise


def _start_worker(reader: Connection) -> None:
    """End this worker when the main process ends, however it ends; exit silently on Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
