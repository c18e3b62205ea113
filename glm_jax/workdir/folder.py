"""The folder that holds everything a run makes, and the check that a config may resume in it.

Checkpoints are sealed with digests, and each records the model section and the tokenizer's digest: config.json and
tokenizer.model are compared with the newest record.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
from collections.abc import Iterator
from pathlib import Path

from glm_jax.config import Experiment, by_key, from_json, role, to_json
from glm_jax.config.fields import to_dict
from glm_jax.data.tokenizers.load import load
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.storage import digests
from glm_jax.storage.files import write_atomic
from glm_jax.types import Json
from glm_jax.workdir import checkpoint_folders
from glm_jax.workdir.checkpoint_format import RUN
from glm_jax.workdir.events import versions

CONFIG = "config.json"
TOKENIZER = "tokenizer.model"


def check(workdir: Path, config: Experiment) -> None:
    """Check that `config` may start or resume in `workdir`. Writes nothing.

    Raises:
        UserError: the workdir was made with other values of frozen keys, is damaged, or cannot be written to.
    """
    check_writable(workdir)
    if not (workdir / CONFIG).exists():
        if _recorded(workdir):
            raise UserError(f"{workdir} has checkpoints but no {CONFIG}: restore the file, or name another --workdir")
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
    path, recorded = workdir / TOKENIZER, _recorded(workdir).get("tokenizer")
    changed = "use the sources that the run began with, or name another --workdir"
    if recorded not in (None, tokenizer.digest):
        raise UserError(f"the checkpoints in {workdir} have another tokenizer than these sources: {changed}")
    if not path.exists() or _digest(path) == tokenizer.digest:
        return
    if recorded:
        raise UserError(f"{path} is damaged: remove it, and the same command writes it again")
    raise UserError(f"{path} is not the tokenizer of these sources: {changed}; if it is damaged, remove it")


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


def identity(config: Experiment, tokenizer: Tokenizer | None) -> Json:
    """Return what a checkpoint records of the model that it holds, and of the packages that wrote it."""
    return {"model": to_dict(config.model), "tokenizer": tokenizer and tokenizer.digest, "versions": versions()}


def lacks_tokenizer(workdir: Path) -> bool:
    """Whether the weights were converted without a tokenizer, and none has been put beside them."""
    return not (workdir / TOKENIZER).exists() and _recorded(workdir).get("tokenizer", "") is None


def read_config(workdir: Path) -> Experiment:
    """Read the resolved config of a workdir.

    Raises:
        UserError: there is none, it is damaged or does not fit this version, or the checkpoints hold another model.
    """
    path = workdir / CONFIG
    if not path.is_file():
        raise UserError(f"{workdir} is not the workdir of a run ({CONFIG} is missing): check --workdir")
    try:
        config = from_json(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): let this user read it") from error
    except UserError as error:
        raise UserError(f"{path} does not fit this version: {error}") from error
    except (ValueError, AttributeError, TypeError, RecursionError) as error:  # ValueError: neither JSON nor UTF-8
        raise UserError(f"{path} is damaged: restore it, or name another --workdir") from error
    now = json.loads(json.dumps(to_dict(config.model)))  # tuples become lists, as in the record
    for key, value in _recorded(workdir).get("model", {}).items():
        if now.get(key, value) != value:
            raise UserError(
                f"{path} says model.{key}={now[key]!r}, but the checkpoints were trained with {value!r}: restore the "
                "file, or name another --workdir"
            )
    return config


def read_tokenizer(workdir: Path) -> Tokenizer:
    """Load the tokenizer of a workdir.

    Raises:
        UserError: there is none, or it is not the one the checkpoints were trained with.
    """
    path, again = workdir / TOKENIZER, "remove it, and training in this --workdir writes it again"
    if not path.is_file():
        raise UserError(f"{path} is missing: train in this --workdir, which writes it")
    if _recorded(workdir).get("tokenizer") not in (None, _digest(path)):
        raise UserError(f"{path} is not the tokenizer that the checkpoints were trained with: {again}")
    try:
        return load(path)
    except UserError as error:
        raise UserError(f"{error}: {again}") from error


def _digest(path: Path) -> str:
    """Return the digest of a tokenizer's file, without loading it."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}): let this user read it") from error


def _recorded(workdir: Path) -> Json:
    """Return the newest whole record of the workdir's checkpoints; empty if there is none."""
    directory = workdir / "checkpoints"
    for step in reversed(checkpoint_folders.sealed(directory)):
        folder = directory / str(step)
        if digests.damage(folder, f"{RUN}/") is None:
            return json.loads((folder / RUN / "metadata").read_text("utf-8"))
    return {}
