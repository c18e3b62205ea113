"""Work that may be killed at any moment and goes on: directories made in pieces, by several processes.

A directory is made under a hidden name beside its own, piece by piece; a piece appears whole or not at all, and the
directory takes its name once all are there. What a killed build left is found again; a lock sees to it that two
processes do not make the same directory at once.
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

TEMPORARY = "."  # what the names of unfinished pieces begin with (files.atomic_directory)


class WorkerDied(UserError):
    """A worker process was killed, as by the system when memory runs out."""


def made(directory: Path, make: Callable[[Path], None]) -> bool:
    """Make `directory` unless it is there.

    Args:
        directory: named by its content, so that what is there is right.
        make: fills an unfinished directory, which may hold pieces that a killed build has finished.

    Returns:
        Whether it was there already.

    Raises:
        UserError: from `make`, and nothing is left then, unless a worker died; there is no room.
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
                f"no room for {directory} ({error.strerror}): make some, or set data.cache; what is finished is kept"
            ) from None
        _remove_temporaries(building)
        sync(building)
        os.replace(building, directory)
        sync(directory.parent)
    return False


@contextlib.contextmanager
def _lock(path: Path) -> Iterator[None]:
    """Wait until no other process is in here with the same path. The lock goes with the process that holds it."""
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
    """Processes that share jobs out; `count` 1 does them here. They start when first needed, and end with the block."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._executor: concurrent.futures.ProcessPoolExecutor | None = None
        self._alive: Connection | None = None  # its other end, in the workers, is at its end once we are gone

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
        """End the processes at once, whatever they do."""
        if self._executor is not None and self._alive is not None:
            self._alive.close()
            self._executor.shutdown(cancel_futures=True)
            self._executor = None

    def run(self, what: str, work: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int]) -> list[Result]:
        """Do `work` for each job and show a progress bar on a terminal.

        Args:
            what: names the bar.
            work: a function that other processes can import.
            jobs: its arguments, picklable.
            sizes: bytes that a job stands for.

        Returns:
            The results in the order of the jobs.

        Raises:
            WorkerDied: a process was killed.
            Exception: what the first of the jobs, in their order, that fails raises.
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
                "a worker process was killed, perhaps for want of memory: the same command with fewer --workers "
                "goes on from what is finished"
            ) from None
        except BaseException:
            self._stop()
            raise


def _start_worker(reader: Connection) -> None:
    """End with the main process, however that ends, and without a word at Ctrl-C."""
    signal.signal(signal.SIGINT, lambda *_: os._exit(130))

    def watch() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
