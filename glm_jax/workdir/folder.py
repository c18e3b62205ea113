"""The folder that holds everything a run makes, and the check that a config may resume in it."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path

from glm_jax.config import Experiment, by_key, from_json, role, to_json
from glm_jax.data.tokenizers.load import load
from glm_jax.data.tokenizers.sentencepiece import Tokenizer
from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"


def check(workdir: Path, config: Experiment) -> None:
    """Check that `config` may start or resume in `workdir`. Writes nothing.

    Raises:
        UserError: the workdir was made with other values of frozen keys, is damaged, or cannot be written to.
    """
    check_writable(workdir)
    if not (workdir / CONFIG).exists():
        return
    before = by_key(read_config(workdir))
    after = by_key(config)
    for key in sorted(before.keys() | after.keys()):
        if role(key) == "frozen" and before.get(key) != after.get(key):
            raise UserError(
                f"{workdir} was made with {key}={before.get(key)!r}, this config says {after.get(key)!r}: "
                "set it back, or name another --workdir"
            )


def check_writable(workdir: Path) -> None:
    """Check that a workdir can be written to, or can be made. Writes nothing.

    Raises:
        UserError: it cannot.
    """
    try:
        nearest = next(path for path in (workdir, *workdir.absolute().parents) if path.exists())
    except OSError as error:  # the name is too long, or a parent may not be searched
        raise UserError(f"--workdir {str(workdir)[:80]} cannot be used ({error.strerror}): name another") from error
    if not nearest.is_dir():
        raise UserError(f"--workdir {workdir}: {nearest} is a file, name a directory")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise UserError(f"--workdir {workdir}: {nearest} cannot be written to, name another")


@contextlib.contextmanager
def lock(workdir: Path) -> Iterator[None]:
    """Make a workdir if needed and, if its file system has locks, keep other runs out of it during the block.

    Raises:
        UserError: another run is using it, or it cannot be made.
    """
    try:
        workdir.mkdir(parents=True, exist_ok=True)
        folder = os.open(workdir, os.O_RDONLY)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be used ({error.strerror}): name another") from error
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise UserError(f"another run is using {workdir}: wait for it, or name another --workdir") from error
        except OSError:  # no locks here, as on some network file systems
            pass
        yield
    finally:
        os.close(folder)


def check_tokenizer(workdir: Path, tokenizer: Tokenizer) -> None:
    """Check that the tokenizer is the one the workdir's model was trained with.

    Raises:
        UserError: it is not.
    """
    path = workdir / TOKENIZER
    if path.exists() and load(path).digest != tokenizer.digest:
        raise UserError(
            f"{path} is not the tokenizer of these sources: use the sources that the run began with, "
            "or name another --workdir"
        )


def write(workdir: Path, config: Experiment, tokenizer: Tokenizer) -> None:
    """Write the files that generation needs besides a checkpoint.

    Raises:
        UserError: the workdir cannot be written to.
    """
    try:
        write_atomic(workdir / CONFIG, to_json(config))
        if not (workdir / TOKENIZER).exists():
            write_atomic(workdir / TOKENIZER, tokenizer.model)
    except OSError as error:
        raise UserError(f"--workdir {workdir} cannot be written to ({error.strerror}): name another") from error


def read_config(workdir: Path) -> Experiment:
    """Read the resolved config of a workdir.

    Raises:
        UserError: there is none, or it is damaged or does not fit this version.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not the workdir of a run ({CONFIG} is missing): check --workdir")
    try:
        return from_json(path.read_text(encoding="utf-8"))
    except UserError as error:
        raise UserError(f"{path} does not fit this version: {error}") from error
    except (ValueError, AttributeError, TypeError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path} is damaged: restore it, or name another --workdir") from error


def read_tokenizer(workdir: Path) -> Tokenizer:
    """Load the tokenizer of a workdir.

    Raises:
        UserError: there is none.
    """
    if not (workdir / TOKENIZER).is_file():
        raise UserError(f"{workdir / TOKENIZER} is missing: train in this --workdir first")
    return load(workdir / TOKENIZER)
