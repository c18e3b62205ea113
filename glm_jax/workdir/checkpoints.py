"""Checkpoints with orbax: one layout on disk whatever mesh wrote it, sealed with digests of every file."""

from __future__ import annotations

import asyncio
import errno
import functools
import itertools
import json
import logging
import os
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import future

from glm_jax.errors import UserError
from glm_jax.storage import digests
from glm_jax.storage.files import sync
from glm_jax.types import Json, Tree
from glm_jax.workdir import checkpoint_folders, checkpoint_format
from glm_jax.workdir.checkpoint_folders import disk_reason, everyone, newest_good, refusal, temporary, written_by

CHUNK_BYTES = 32 * 2**20
PATIENCE = 3600  # seconds that processes wait for one another's part of a checkpoint

_saves = itertools.count()  # the same in all processes, as all save together


class Restored(NamedTuple):
    """The trees of a checkpoint on the mesh, by name, and the record saved beside them."""

    items: dict[str, Tree]
    run: Json


class _Outcome(NamedTuple):
    reason: str | None  # why the disk refused; None if everything was saved
    seconds: float
    bytes: int


class _Save(NamedTuple):
    step: int
    blocked: float  # seconds
    outcome: Future[_Outcome]


class Checkpoints:
    """The checkpoints of one workdir, in `checkpoints/<step>/`.

    Each holds named trees (for a run: `params`, and `training`, the rest of its state), `run` (JSON: step, samples as
    the data position, and whatever else the caller passes) and the digests of all files. Writing continues in the
    background while the next steps run: orbax writes to a temporary folder, every process seals what it wrote, process
    0 seals the rest, and only then does the folder get its name. So an interrupted save leaves nothing that could be
    mistaken for a checkpoint.

    In a run of several processes all must make the same calls, except `events`, `steps` and `latest_step`.
    """

    def __init__(
        self, workdir: Path, keep: int = 3, keep_every: int = 0, say: Callable[[str], None] = lambda _: None
    ) -> None:
        """Remove what interrupted saves left behind.

        Args:
            workdir: of the run. Nothing is made in it before the first save.
            keep: how many of the newest checkpoints to keep. Older ones are removed once a newer one is whole on disk.
            keep_every: keep every step that this divides for good; 0 disables this.
            say: called with one line at a time, in the calling thread.
        """
        self.directory = (workdir / "checkpoints").resolve()
        self._begun = workdir.is_dir()
        self._keep, self._keep_every, self._say = keep, keep_every, say
        self._handler = ocp.StandardCheckpointHandler()
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        self._save: _Save | None = None
        self._events: list[Json] = []
        self._unsaved: str | None = None
        _hush()
        if jax.process_index() == 0:
            checkpoint_folders.sweep(self.directory)

    def steps(self) -> list[int]:
        """Return the steps that were saved whole, oldest first, without checking whether they still are."""
        return checkpoint_folders.sealed(self.directory)

    def latest_step(self) -> int | None:
        """Return the newest of `steps`, or None."""
        return max(self.steps(), default=None)

    def written_step(self) -> int | None:
        """Wait until what was saved is written, and return the newest of `steps`, or None."""
        self._settle()
        return self.latest_step()

    def save(self, items: Mapping[str, Tree], run: Json) -> None:
        """Save trees of arrays, by name, under `run["step"]`; return once they are copied, before they are written.

        A save that the disk refuses is reported to `say` and changes nothing else; see `events` and `unsaved`.
        """
        started = time.monotonic()
        self._settle()
        step, record = int(run["step"]), json.dumps(run)
        reason, commits = self._make_folder(step, items), []
        if reason is None:
            reason = refusal(lambda: commits.extend(self._copy(step, items)))
        key = f"glm_jax_checkpoint_{next(_saves)}"
        outcome = self._thread.submit(self._finish, step, record, commits, reason, started, key)
        self._save = _Save(step, time.monotonic() - started, outcome)

    def restore(
        self, targets: Mapping[str, Tree], at_most: int | None = None, make_room: Callable[[], object] = lambda: None
    ) -> Restored | None:
        """Restore the newest good step, each device reading its own part.

        Every file is first compared with its digest. Damaged and interrupted checkpoints are reported to `say` and
        skipped. Once a good one is found, they are set aside as `<step>.damaged`.

        Args:
            targets: trees of jax.ShapeDtypeStruct with shardings, by name. Config and mesh may differ from those of the
                run that saved, as long as the arrays keep their shapes.
            at_most: go back to this step or an earlier one. The run continues from there, also after a restart: newer
                checkpoints are set aside as `<step>.left`.
            make_room: called once nothing can be refused any more, before arrays are read.

        Returns:
            The restored checkpoint, or None if there is none (up to `at_most`).

        Raises:
            UserError: no checkpoint is good, and all are left unchanged; or the newest good one has arrays of other
                shapes or dtypes than this config.
        """
        self._settle()
        folders = checkpoint_folders.folders(self.directory)
        newer = [step for step in folders if at_most is not None and step > at_most]
        step, damaged = newest_good(self.directory, folders[: len(folders) - len(newer)], "", self._say)
        if step is not None:
            self._check(targets, step)
        make_room()
        restored = None if step is None else self._read(targets, step)
        if jax.process_index() == 0:
            for other in damaged:
                checkpoint_folders.set_aside(self.directory, other, "damaged")
            for other in newer:
                checkpoint_folders.set_aside(self.directory, other, "left")
        everyone("")  # no process may list the folder before it is tidy
        return restored

    def events(self) -> list[Json]:
        """Return what has happened since the last call, for the log.

        Returns:
            {"event": "checkpoint", "step", "seconds" (from the call to the end), "blocked_seconds" (of the call),
            "bytes"} for each finished save, {"event": "checkpoint", "step", "error"} for each failed one.
        """
        self._settle(wait=False)
        events, self._events = self._events, []
        return events

    def unsaved(self) -> str | None:
        """Return why the last finished save is not on the disk, or None. After `close`, this is about the last save."""
        return self._unsaved

    def close(self) -> None:
        """Wait until everything is written.

        But do not wait while an error ends a run of several processes: the save in flight waits for the others, and
        they may be gone.
        """
        if jax.process_count() > 1 and sys.exc_info()[0] is not None:
            return
        try:
            self._settle()
        finally:
            self._thread.shutdown()

    def _make_folder(self, step: int, items: Iterable[str]) -> str | None:
        """Make the temporary folder in process 0; return, in all processes, why that failed, or None."""

        def make() -> None:
            if self._begun and not self.directory.parent.is_dir():
                raise OSError(errno.ENOENT, "the workdir has been removed")
            self._begun = True
            checkpoint_folders.sweep(self.directory)
            if (self.directory / str(step)).exists():  # saved by the run before it went back
                checkpoint_folders.set_aside(self.directory, step, "left")
            for item in (*items, "run"):
                (temporary(self.directory, step) / item).mkdir(parents=True)

        reason = refusal(make) if jax.process_index() == 0 else None
        return everyone(reason or "")[0] or None

    def _copy(self, step: int, items: Mapping[str, Tree]) -> Iterator[future.Future]:
        """Copy the arrays off the devices; yield orbax's futures, which end when the arrays are written."""
        for item, tree in items.items():
            args = ocp.args.StandardSave(tree, save_args=_in_chunks(tree))
            saving = self._handler.async_save(epath.Path(temporary(self.directory, step) / item), args=args)
            # in the thread, because a notebook's main thread may already have an event loop
            yield from self._thread.submit(asyncio.run, saving).result() or []

    def _finish(
        self, step: int, record: str, commits: Sequence[future.Future], reason: str | None, started: float, key: str
    ) -> _Outcome:
        """Wait for this process's arrays and seal them; process 0 then completes the folder. Runs in the thread.

        The processes meet at two barriers, whatever failed in any of them. They use no collective, which could mix with
        those of the steps that run in the meantime.
        """
        wait_for_all = ocp.multihost.get_barrier_sync_fn()
        index, count = jax.process_index(), jax.process_count()
        folder, final = temporary(self.directory, step), self.directory / str(step)

        reasons = [reason, *(refusal(commit.result) for commit in commits)]  # all, so that nothing still writes
        reason = next(filter(None, reasons), None)
        if index:
            reason = reason or refusal(lambda: digests.seal(folder, written_by(folder, index), index, count))
        wait_for_all(key=f"{key}_written", timeout_ms=PATIENCE * 1000)
        if index == 0:
            reason = reason or refusal(lambda: self._complete(step, record))
            if reason:
                checkpoint_folders.remove(folder)
        wait_for_all(key=f"{key}_complete", timeout_ms=PATIENCE * 1000)
        if reason is None and not digests.is_sealed(final):
            reason = "another process could not write its part"
        outcome = _Outcome(reason, time.monotonic() - started, 0 if reason else digests.size(final))
        if index == 0 and reason is None:
            checkpoint_folders.prune(self.directory, self._keep, self._keep_every)
        return outcome

    def _complete(self, step: int, record: str) -> None:
        """Write the remaining files, seal them, and give the folder its name."""
        folder, count = temporary(self.directory, step), jax.process_count()
        if len(list(folder.glob("digests-*.json"))) < count - 1:
            raise OSError(errno.EIO, "another process could not write its part")
        items = sorted(item.name for item in folder.iterdir() if item.is_dir())
        with checkpoint_folders.literal(folder) as path:
            for item in items:
                if item != checkpoint_format.RUN:
                    self._handler.finalize(epath.Path(path / item))
        (folder / checkpoint_format.RUN / "metadata").write_text(record, "utf-8")
        checkpoint_format.describe(folder, items)
        digests.seal(folder, written_by(folder, 0), 0, count)
        os.rename(folder, self.directory / str(step))
        sync(self.directory)

    def _settle(self, wait: bool = True) -> None:
        """Record how the current save ended; return at once if it has not ended and `wait` is False."""
        if self._save is None or not (wait or self._save.outcome.done()):
            return
        (step, blocked, outcome), self._save = self._save, None
        reason, seconds, size = outcome.result()
        event: Json = {"event": "checkpoint", "step": step}
        if reason is None:
            event |= {"seconds": seconds, "blocked_seconds": blocked, "bytes": size}
        else:
            event["error"] = reason
            latest = self.latest_step()
            kept = "there is none yet" if latest is None else f"the newest is still that of step {latest}"
            self._say(f"checkpoint {step} could not be saved ({reason}): the run continues, {kept}")
        self._events.append(event)
        self._unsaved = reason

    def _check(self, targets: Mapping[str, Tree], step: int) -> None:
        folder = epath.Path(self.directory / str(step))
        for item, tree in targets.items():
            if not (folder / item).exists():
                raise UserError(
                    f"{folder} holds params alone, no run can resume from it: name another --workdir, and this one as "
                    "train.init_from to start from its weights"
                    if item == "training"
                    else f"{folder} holds no {item}: name another --workdir"
                )
            self._check_fits(folder / item, tree)

    def _read(self, targets: Mapping[str, Tree], step: int) -> Restored:
        folder = epath.Path(self.directory / str(step))
        items = {
            item: self._handler.restore(folder / item, args=ocp.args.StandardRestore(tree))
            for item, tree in targets.items()
        }
        return Restored(items, json.loads((folder / "run" / "metadata").read_text("utf-8")))

    def _check_fits(self, item: epath.Path, target: Tree) -> None:
        """Compare shapes and dtypes: orbax would silently convert the latter."""
        stored, wanted = (
            {"/".join(path): f"{np.dtype(leaf.dtype)} {list(leaf.shape)}" for path, leaf in flat.items()}
            for flat in map(ocp.tree.to_flat_dict, (self._handler.metadata(item).tree, target))
        )
        for name in sorted(stored.keys() | wanted.keys()):
            there, here = stored.get(name, "missing"), wanted.get(name, "nothing")
            if there != here:
                raise UserError(
                    f"{item.parent} does not fit this config: {item.name}/{name} is {there}, this config wants {here}: "
                    "set the config back, or name another --workdir"
                )


@functools.cache
def _hush() -> None:
    """Keep orbax, asyncio and tensorstore from printing what the disk refused: `say` reports it in one line."""
    for name in ("absl", "asyncio"):
        logging.getLogger(name).addFilter(lambda record: not (record.exc_info and disk_reason(record.exc_info[1])))
    hook = sys.unraisablehook
    # writes that end after another one failed find their event loop closed
    sys.unraisablehook = lambda found: None if str(found.exc_value) == "Event loop is closed" else hook(found)


def _in_chunks(tree: Tree) -> Tree:
    """Ask for small chunks on disk, so that a reader need not hold a whole array of a large model."""
    return jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=CHUNK_BYTES), tree)
