"""Where a run's events go: metrics.jsonl, TensorBoard files, Weights & Biases.

A sink has `write(event)`, `rewind(step)`, which drops what came after a step that the run goes back to, and `close()`.
They raise OSError if the disk is full; the next write then tries again.
"""

from __future__ import annotations

import importlib.metadata
import json
import logging
import secrets
import socket
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Protocol

from glm_jax.errors import UserError
from glm_jax.storage.files import json_line, write_atomic
from glm_jax.types import Json

if TYPE_CHECKING:
    from google.protobuf.message import Message
    from tensorboardX.record_writer import RecordWriter

Event = Json

METRICS = "metrics.jsonl"
FLUSH_SECONDS = 30.0  # how far TensorBoard may lag behind


class Sink(Protocol):
    """What the monitor needs from a sink."""

    name: str

    def write(self, event: Event) -> None: ...

    def rewind(self, step: int) -> None: ...

    def close(self) -> None: ...


def scalars(event: Event) -> Iterator[tuple[str, float]]:
    """Yield (name, number) for what can be plotted: `<event>/<key>`; for lists by layer, `<event>/<key>/layer_03`.

    Losses are `0_loss/<event>` and `0_loss/<event>/<source>`, because TensorBoard sorts by name and they come first.
    """
    for key, value in event.items():
        if key in ("event", "step"):
            continue
        head, slash, rest = key.partition("/")
        name = f"0_loss/{event['event']}{slash}{rest}" if head == "loss" else f"{event['event']}/{key}"
        if isinstance(value, list):
            digits = max(2, len(str(len(value) - 1)))
            yield from ((f"{name}/layer_{layer:0{digits}d}", number) for layer, number in enumerate(value))
        elif isinstance(value, int | float):
            yield name, value


class Jsonl:
    """One event per line, null for numbers not finite. Lines that a full disk refuses wait for the next write.

    Attributes:
        damaged: the numbers of the lines that were dropped when it was opened because they were damaged.
        empty: whether there were no events.
    """

    name = METRICS

    def __init__(self, path: Path, step: int) -> None:
        self._path, self._pending = path, b""
        self.damaged = drop_after(path, step)
        self.empty = not path.exists() or not path.stat().st_size
        self._file = open(path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def write(self, event: Event) -> None:
        self._pending += json_line(event).encode("ascii")
        self._drain()

    def rewind(self, step: int) -> None:
        self._drain()
        self._file.close()
        try:
            drop_after(self._path, step)
        finally:
            self._file = open(self._path, "ab", buffering=0)  # noqa: SIM115 (closed by close)

    def close(self) -> None:
        with self._file:
            self._drain()

    def _drain(self) -> None:
        while self._pending:
            self._pending = self._pending[self._file.write(self._pending) :]


def drop_after(path: Path, step: int) -> list[int]:
    """Replace metrics.jsonl by a file with its events up to `step`, without incomplete or damaged lines.

    Returns:
        The numbers of the damaged lines, from 1. An incomplete last line is none: it comes from an interrupted run.
    """
    if not path.exists():
        return []
    kept, damaged = [], []
    *lines, _ = path.read_text(encoding="utf-8", errors="replace").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            if json.loads(line)["step"] <= step:
                kept.append(line + "\n")
        except (ValueError, KeyError, TypeError, RecursionError):
            damaged.append(number)
    write_atomic(path, "".join(kept))
    return damaged


def append(workdir: Path, events: Iterable[Event]) -> None:
    """Append events to the metrics.jsonl of a run that has ended.

    Raises:
        UserError: it cannot be written.
    """
    try:
        with open(workdir / METRICS, "ab") as file:
            file.write("".join(map(json_line, events)).encode("ascii"))
    except OSError as error:
        raise UserError(f"{workdir / METRICS} cannot be written ({error.strerror}): make room for it") from error


class TensorBoard:
    """Scalars in event files, written in this thread: tensorboardX's own writer hangs once a disk was full."""

    name = "tensorboard/"

    def __init__(self, folder: Path, step: int) -> None:
        logging.getLogger("tensorboardX.x2num").setLevel(logging.ERROR)  # the run itself says what is not finite
        self._folder, self._writer, self._flushed = folder, None, 0.0
        self._purge = step + 1

    def write(self, event: Event) -> None:
        from tensorboardX import summary

        try:
            writer = self._writer or self._open()
            message = _message(event["step"])
            for name, value in scalars(event):
                message.summary.MergeFrom(summary.scalar(name, value))
            writer.write(message.SerializeToString())
            self._purge = event["step"] + 1  # if this file fails, the next one must not drop what it holds
            if time.monotonic() - self._flushed > FLUSH_SECONDS:
                writer.flush()
                self._flushed = time.monotonic()
        except OSError:  # readers stop at an incomplete record, so continue in another file
            self._abandon()
            raise

    def rewind(self, step: int) -> None:
        self.close()
        self._purge = step + 1

    def close(self) -> None:
        if self._writer is not None:
            writer, self._writer = self._writer, None
            writer.close()

    def _open(self) -> RecordWriter:
        """Open a file that tells TensorBoard to drop the steps from `_purge` on that earlier files hold."""
        from tensorboardX.record_writer import RecordWriter

        self._folder.mkdir(parents=True, exist_ok=True)
        number = len(list(self._folder.iterdir()))  # two files may start in the same second
        name = f"events.out.tfevents.{int(time.time())}.{socket.gethostname()}.{number}"
        self._writer = writer = RecordWriter(str(self._folder / name))
        for content in ({"file_version": "brain.Event:2"}, {"session_log": {"status": "START"}}):
            writer.write(_message(self._purge, **content).SerializeToString())
        return writer

    def _abandon(self) -> None:
        try:
            self.close()
        except OSError:  # the same full disk
            self._writer = None


class _Message(Protocol):
    """The part of TensorBoard's Event used here; its class has no types."""

    summary: Message

    def SerializeToString(self) -> bytes: ...


def _message(step: int, **content: object) -> _Message:
    from tensorboardX.proto import event_pb2

    return event_pb2.Event(wall_time=time.time(), step=step, **content)  # pyright: ignore[reportAttributeAccessIssue]


def import_wandb() -> ModuleType:
    """Import and return the optional package wandb.

    Raises:
        UserError: it is not installed.
    """
    try:
        import wandb  # pyright: ignore[reportMissingImports]
    except ImportError as error:
        raise UserError("train.wandb names a project, but wandb is not installed: pip install wandb") from error
    return wandb


class WeightsAndBiases:
    """A run of a Weights & Biases project. Without a server it writes to the workdir's wandb/, to be synced later."""

    name = "wandb"

    def __init__(self, workdir: Path, project: str) -> None:
        wandb = import_wandb()
        identity = workdir / "wandb_id"  # in the workdir, so that a run resumed elsewhere stays one run
        if not identity.exists():
            write_atomic(identity, secrets.token_hex(8))
        options = {
            "project": project,
            "name": workdir.absolute().name,
            "dir": str(workdir),
            "id": identity.read_text(encoding="ascii"),
            "resume": "allow",
        }
        try:
            self._run = wandb.init(**options)
        except wandb.Error:  # there is no network, or nobody is logged in
            self._run = wandb.init(**options, mode="offline")
        self._run.define_metric("*", step_metric="step")  # wandb's own steps cannot go back, ours can

    def write(self, event: Event) -> None:
        self._run.log({"step": event["step"], **dict(scalars(event))})

    def rewind(self, step: int) -> None:
        """Keep what was reported: the curves show both passes."""

    def close(self) -> None:
        self._run.finish()


def versions() -> dict[str, str]:
    """Return the versions of the packages that a run's numbers and files depend on."""
    return {name: importlib.metadata.version(name) for name in ("glm-jax", "jax", "orbax-checkpoint")}
