"""What a run begins with: the weights that `train.init_from` names, and their tokenizer."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from pathlib import Path

import numpy as np

from glm_jax.config import Experiment
from glm_jax.config.fields import to_dict
from glm_jax.data.tokenizers.load import read
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.interop import arrays
from glm_jax.interop.sources import Source
from glm_jax.interop.weights import Weights, open_recorded, open_weights
from glm_jax.parallel import processes
from glm_jax.types import Json, Tree
from glm_jax.workdir import checkpoint_folders, folder
from glm_jax.workdir.checkpoint_format import Index
from glm_jax.workdir.interventions import Record

Say = Callable[[str], None]
RESIZE = "set train.init_from_vocabulary=resize to keep the embedding's rows by number all the same"


@dataclasses.dataclass(frozen=True)
class Initial:
    """The beginning of a run, checked but not loaded.

    Attributes:
        config: of the run.
        say: called with one line at a time.
        tokenizer: for the run's data; None to do as `data.tokenizer` says.
        weights: opened; None until a run needs them, which a resumed one seldom does.
    """

    config: Experiment
    say: Say
    tokenizer: Tokenizer | None = None
    weights: Weights | None = None

    def load(self, params: Tree) -> Tree:
        """Overwrite fresh params on a mesh with the weights, each process its own part; nothing if there are none.

        Rows of the vocabulary and of learned positions that the weights lack stay fresh, and so do padded layers.

        Args:
            params: float32, donated.

        Raises:
            UserError: the weights cannot be read any more.
        """
        if not self.config.train.init_from:
            return params
        weights = self._opened
        try:
            filled = {path: arrays.fill(array, _kept(self.config, weights, path))
                      for path, array in arrays.leaves(params).items()}  # fmt: skip
        except OSError as error:
            raise UserError(f"{weights.path} cannot be read ({error.strerror}): bring it back") from error
        self.say(f"weights: those of {weights.path}" + ("" if weights.step is None else f", step {weights.step:,}"))
        return arrays.nest(filled)

    def note(self, record: Record) -> None:
        """Note in the record of a run's changes, at step 0, where the weights came from, if there are any."""
        if self.config.train.init_from and all(line.get("weights") != self.found for line in record.lines):
            record.add(0, 0, "init_from", {}, weights=self.found)

    def again(self, recorded: Json) -> Initial:
        """Return the same with the weights of a record, for which adapters were trained. All processes must call.

        Raises:
            UserError: they are others by now, or cannot be opened.
        """
        given = _given(self.config)
        return dataclasses.replace(self, weights=open_recorded(recorded, self.config.train.init_from, given, self.say))

    @functools.cached_property
    def found(self) -> Json:
        """The record of the weights, in the first process; empty in others."""
        weights = self._opened
        found = weights.record() if processes.is_first() else {}  # may read all of an official checkpoint
        processes.wait_for_all()
        return found

    @functools.cached_property
    def _opened(self) -> Weights:
        return self.weights or _open(self.config, self.say)


def begin(config: Experiment, workdir: Path | None, say: Say) -> Initial:
    """Check what `train.init_from` names against a run. In a run of several processes all must call this.

    A run that resumes from a checkpoint of its own needs the weights no more, nor looks at them.

    Args:
        config: resolved.
        workdir: of the run; None if there is no run yet.
        say: called with one line at a time.

    Raises:
        UserError: there are no such weights, or they are of another model or vocabulary. Nothing was written.
    """
    start = Initial(config, say)
    if not config.train.init_from:
        return start
    given, resize = config.data.tokenizer, config.train.init_from_vocabulary == "resize"
    tokenizer = read(given.path, pinned=given.pinned) if given.path else None
    if workdir is not None and checkpoint_folders.folders(workdir / "checkpoints"):
        if tokenizer or resize:
            return dataclasses.replace(start, tokenizer=tokenizer)
        if (workdir / folder.TOKENIZER).is_file():
            return dataclasses.replace(start, tokenizer=folder.read_tokenizer(workdir))
    weights = _open(config, say)
    if resize:
        return dataclasses.replace(start, tokenizer=tokenizer, weights=weights)
    theirs = weights.read_tokenizer()
    if theirs is None:
        if tokenizer is None:
            raise UserError(
                f"{weights.path} has no tokenizer: name the file of its own as data.tokenizer.path, or {RESIZE}"
            )
        if tokenizer.size > weights.config.vocab_size:
            raise UserError(
                f"{weights.path} has a vocabulary of {weights.config.vocab_size:,}, the tokenizer {given.path} has "
                f"{tokenizer.size:,} pieces: name its own as data.tokenizer.path, or {RESIZE}"
            )
    else:
        if tokenizer is not None and tokenizer.digest != theirs.digest:
            raise UserError(
                f"the tokenizer {given.path} is not the one of {weights.path}: unset data.tokenizer.path, or {RESIZE}"
            )
        if tokenizer is None:
            say(f"tokenizer: that of {weights.path}, {theirs.size:,} pieces")
        tokenizer = theirs
    if config.train.lora.rank and tokenizer is not None:
        _check_whole(config, weights, tokenizer.size)
    return dataclasses.replace(start, tokenizer=tokenizer, weights=weights)


def _check_whole(config: Experiment, weights: Weights, pieces: int) -> None:
    """Refuse other tables than the weights': with adapters, rows that are added to them would be saved nowhere."""
    ours, theirs = config.glm(pieces), weights.config
    if ours.vocab_size != theirs.vocab_size:
        raise UserError(f"train.lora needs the embedding of {weights.path} as it is: set model.vocab_size to "
                        f"{theirs.vocab_size}")  # fmt: skip
    if ours.position == "learned_2d" and ours.max_length != theirs.max_length:
        raise UserError(f"train.lora needs the positions of {weights.path} as they are: set model.max_length to "
                        f"{theirs.max_length}")  # fmt: skip


def _open(config: Experiment, say: Say) -> Weights:
    try:
        return open_weights(config.train.init_from, _given(config), say)
    except UserError as error:
        raise UserError(f"train.init_from: {error}") from error


def _given(config: Experiment) -> dict[str, object]:
    """Return the keys of the model that its weights must have."""
    sizes = ("vocab_size", "max_length")  # these may differ, see `load`
    return {key: value for key, value in to_dict(config.model).items() if key not in sizes}


@dataclasses.dataclass(frozen=True)
class _Rows:
    """The first rows of an array on disk."""

    source: Source
    rows: int

    @property
    def shape(self) -> tuple[int, ...]:
        return (min(self.rows, self.source.shape[0]), *self.source.shape[1:])

    def read(self, index: Index, dtype: np.dtype | None = None) -> np.ndarray:
        return self.source.read(index, dtype)


def _kept(config: Experiment, weights: Weights, path: tuple[str, ...]) -> Source:
    """Return the part of an array that a run begins with: for another vocabulary, without rows that only fill it up."""
    source, resize = weights.parameters[path], config.train.init_from_vocabulary == "resize"
    if path == ("embedding", "word") and resize and (tokenizer := weights.read_tokenizer()) is not None:
        return _Rows(source, tokenizer.size)
    return source
