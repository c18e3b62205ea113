"""Processes that share the work of a build, which may be killed at any moment."""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures.process import BrokenProcessPool
from multiprocessing.connection import Connection
from typing import Self, TypeVar

from tqdm import tqdm

from glm_jax import signals
from glm_jax.errors import UserError

Job = TypeVar("Job")
Result = TypeVar("Result")


class WorkerDied(UserError):
    """A worker process was killed, for example by the system when memory ran out."""


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

    def run(
        self, what: str, work: Callable[[Job], Result], jobs: Sequence[Job], sizes: Sequence[int], unit: str = "B"
    ) -> list[Result]:
        """Run `work` on each job, with a progress bar on a terminal.

        Args:
            what: the bar's label.
            work: a function that other processes can import.
            jobs: its arguments, picklable.
            sizes: how far each job moves the bar, in its unit.
            unit: of the bar; `B` is bytes.

        Returns:
            The results in the order of the jobs.

        Raises:
            WorkerDied: a process was killed.
            Exception: raised by the first job, in their order, that fails.
        """
        results: list[Result] = []
        with tqdm(total=sum(sizes), desc=what, unit=unit, unit_scale=unit == "B", leave=False, disable=None) as bar:
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
            with signals.blocked():  # a process may start at each
                futures = [executor.submit(work, job) for job in jobs]
            for future in futures:
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
    """End this worker when the main process ends, however it ends."""

    def watch() -> None:
        reader.poll(None)
        os._exit(1)

    threading.Thread(target=watch, daemon=True).start()
