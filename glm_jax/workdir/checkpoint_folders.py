"""The folders of a workdir's checkpoints: which exist, which are good, and which may be removed.

All processes of a run must come to the same verdict on a folder; the functions by which they agree are here, too, and
alone import jax.
"""

from __future__ import annotations

import contextlib
import glob
import itertools
import os
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from glm_jax.errors import UserError
from glm_jax.storage import digests
from glm_jax.storage.files import sync

TEMPORARY = ".orbax-checkpoint-tmp"  # orbax's suffix for unfinished checkpoints, so that its tools recognise them
MESSAGE_BYTES = 512  # of a message from one process to the others


def temporary(directory: Path, step: int) -> Path:
    """Return the folder that becomes the folder of `step` once it is whole."""
    return directory / f"{step}{TEMPORARY}"


def folders(directory: Path) -> list[int]:
    """Return the steps that have a folder, oldest first."""
    names = [path.name for path in directory.iterdir() if path.is_dir()] if directory.is_dir() else []
    return sorted(int(name) for name in names if name.isdecimal() and name == str(int(name)))


def sealed(directory: Path) -> list[int]:
    """Return the steps that were saved whole, oldest first, without checking whether they still are."""
    return [step for step in folders(directory) if digests.is_sealed(directory / str(step))]


def sweep(directory: Path) -> None:
    """Remove what interrupted saves and removals left behind."""
    for folder in directory.glob(f"*{TEMPORARY}*"):
        shutil.rmtree(folder, ignore_errors=True)


def remove(folder: Path) -> None:
    """Remove a folder that tensorstore's threads may still be writing to after a failed write."""
    for _ in range(10):
        shutil.rmtree(folder, ignore_errors=True)
        time.sleep(0.05)
        if not folder.exists():
            return


@contextlib.contextmanager
def literal(folder: Path) -> Iterator[Path]:
    """Yield a path to a folder without the brackets that orbax, which looks for its files by a glob, takes for one."""
    if glob.escape(str(folder)) == str(folder):
        yield folder
        return
    with tempfile.TemporaryDirectory() as temporary:
        link = Path(temporary) / "folder"
        link.symlink_to(folder)
        yield link


def prune(directory: Path, keep: int, keep_every: int) -> None:
    """Remove all checkpoints but the newest `keep` and those whose step `keep_every` divides; 0 disables the latter.

    Two stay at least: whether the params of the newest are healthy shows only in the next step, which proves all older.
    A removal that fails does not spoil this save; it is tried again after the next one.
    """
    for step in sealed(directory)[: -max(keep, 2)]:
        if keep_every == 0 or step % keep_every:
            with contextlib.suppress(OSError):
                # rename first, so that an interrupted removal does not look like a damaged checkpoint
                os.rename(directory / str(step), temporary(directory, step))
                shutil.rmtree(temporary(directory, step))


def set_aside(directory: Path, step: int, why: str) -> None:
    """Rename the folder of a step to `<step>.<why>`, or `<step>.<why>.2` and so on if that exists."""
    suffixes = itertools.chain([""], (f".{number}" for number in itertools.count(2)))
    paths = (directory / f"{step}.{why}{suffix}" for suffix in suffixes)
    os.rename(directory / str(step), next(path for path in paths if not path.exists()))
    sync(directory)


def newest_good(
    directory: Path, steps: Sequence[int], under: str, say: Callable[[str], None]
) -> tuple[int | None, list[int]]:
    """Return the newest step whose files are unchanged. All processes share the reading and get the same answer.

    Args:
        directory: of the checkpoints.
        steps: to choose from, oldest first. Those of process 0 are used.
        under: check only files whose path in the step's folder starts with this.
        say: called with a line about each damaged step.

    Returns:
        The step, or None if there are no steps; and the newer steps, which are damaged.

    Raises:
        UserError: there are steps, and all are damaged.
    """
    import jax

    damaged: dict[int, str] = {}
    candidates = list(steps)
    while (step := int(everyone(str(candidates.pop() if candidates else -1))[0])) >= 0:
        part = digests.damage(directory / str(step), under, jax.process_index(), jax.process_count())
        told = [damage for damage in everyone(part or "") if damage]
        if not told:
            return step, list(damaged)
        damaged[step] = told[0]
        say(f"checkpoint {step} is skipped: {_sentence(told[0])}")
    if damaged:
        listed = "; ".join(f"{step}: {_sentence(damage)}" for step, damage in damaged.items())
        raise UserError(
            f"no checkpoint in {directory} is good ({listed}): restore one, or remove the folder to start over"
        )
    return None, []


def _sentence(damage: str) -> str:
    return f"it {damage}" if damage == digests.UNFINISHED else damage


def everyone(text: str) -> list[str]:
    """Return the texts of all processes, in order, cut to MESSAGE_BYTES each. A collective if there are several."""
    import jax

    if jax.process_count() == 1:
        return [text]
    from jax.experimental import multihost_utils

    from glm_jax.parallel import processes

    processes.wait_for_all()  # one may first have many files to read or remove, and a collective times out
    row = np.zeros(MESSAGE_BYTES, np.uint8)
    said = np.frombuffer(text.encode()[:MESSAGE_BYTES], np.uint8)
    row[: said.size] = said
    rows = multihost_utils.process_allgather(row)
    return [bytes(row).rstrip(b"\0").decode(errors="ignore") for row in np.asarray(rows)]


def disk_reason(error: BaseException | None) -> str | None:
    """Return why the disk refused, such as "No space left on device", or None for other kinds of errors."""
    if isinstance(error, OSError):
        return error.strerror or str(error)
    code = re.search(r"os_error_code='(\d+)'", str(error))  # as tensorstore reports it, in a ValueError
    return os.strerror(int(code[1])) if code else None


def refusal(write: Callable[[], object]) -> str | None:
    """Run `write` and return why the disk refused, or None if it did not. Other kinds of errors are raised."""
    try:
        write()
    except (OSError, ValueError, RuntimeError) as error:
        if (reason := disk_reason(error)) is None:
            raise
        return reason
    return None


def written_by(folder: Path, index: int) -> list[str]:
    """Return the files that a process wrote: those that orbax names after it, and for process 0 all others, too."""
    owners = ((name, re.search(r"(?:^|[/.])process_(\d+)(?:/|$)", name)) for name in digests.files(folder))
    return [name for name, owner in owners if index == (int(owner[1]) if owner else 0)]
