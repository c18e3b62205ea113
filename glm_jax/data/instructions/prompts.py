"""Instruction samples: turns records and templates into tokenised prompts with answers, for random access.

In GLM-130B's multi-task instruction pre-training (section 2.3 of arXiv 2210.02414), 5% of the rows hold prompted
samples of labelled data sets. A sample is stored as one document, `prompt [MASK] answer eos`, which
blanks.instruction_sample turns into a Sample. No text encodes to [MASK], so the first one in a document divides it.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from glm_jax.config.data import InstructionSet
from glm_jax.data.corpora import readers, samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.registry import DATASETS, Dataset
from glm_jax.data.instructions.templates import Template, read_templates
from glm_jax.data.rows.streams import shuffled
from glm_jax.errors import UserError
from glm_jax.types import Json

FORMAT_VERSION = 2  # raised when the same records give different tokens
SEED = 0  # of the choice of samples under a set's cap: the same in every run


class Tokenizer(Protocol):
    """What this module needs from a tokenizer."""

    mask: int
    eos: int
    digest: str

    def encode(self, text: str, /) -> np.ndarray: ...


class Instructions:
    """The tokenised samples of one set, memory-mapped: `documents[i]` is int32 [n], prompt [MASK] answer eos.

    Attributes:
        lengths: int64 [documents], the tokens of each.
    """

    def __init__(self, directory: Path) -> None:
        """Open a directory that `write` filled."""
        self.lengths: np.ndarray = np.load(directory / "lengths.npy")
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._path = directory / "tokens.bin"
        self._tokens = np.memmap(self._path, "<i4", "r") if len(self.lengths) else np.zeros(0, np.int32)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        start = self._starts[index]
        return np.array(self._tokens[start : start + self.lengths[index]], np.int32)


def encode(text: str, target: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenise a prompt and its answer separately: int32 [n], prompt [MASK] answer eos."""
    return np.concatenate(
        [tokenizer.encode(text), [tokenizer.mask], tokenizer.encode(target), [tokenizer.eos]], dtype=np.int32
    )


def write(directory: Path, prompts: Iterable[tuple[str, str]], tokenizer: Tokenizer) -> None:
    """Tokenise prompts and answers into an empty directory, for `Instructions`; skip those without an answer."""
    lengths = []
    with open(directory / "tokens.bin", "wb") as file:
        for text, target in prompts:
            if target:
                document = encode(text, target, tokenizer)
                file.write(document.astype("<i4").tobytes())
                lengths.append(len(document))
    np.save(directory / "lengths.npy", np.array(lengths, np.int64))


def read_records(files: Iterable[Path]) -> Iterator[tuple[str, Json]]:
    """Yield (place, record) from .jsonl, .jsonl.zst and .parquet files, in order. The place is file and line.

    Raises:
        UserError: another kind of file, a damaged record, or a missing package.
    """
    for file in files:
        form = next((form for form in ("jsonl", "jsonl.zst", "parquet") if file.name.endswith(f".{form}")), None)
        if form is None:
            raise UserError(f"{file} is not a file of records: give .jsonl, .jsonl.zst or .parquet")
        for located in readers.read_records(file, form):
            if isinstance(located, readers.Damaged):
                raise UserError(f"{file}, line {located.line}: {located.message}")
            line, record = located
            yield f"{file}, line {line}", record


def prompted(files: Sequence[Path], templates: Sequence[Template], cap: int) -> Iterator[tuple[str, str]]:
    """Yield the (prompt, answer) pairs that templates make of records.

    Every pair of a record and a template is one sample. Of more than `cap` pairs, a fixed random choice of `cap` is
    taken. The files are read twice and never held in memory.

    Args:
        files: of records.
        templates: if empty, records must have `text` and `target`.
        cap: the most samples to take; 0 takes all.

    Raises:
        UserError: a record is damaged, or a template fails on one.
    """
    kinds = max(1, len(templates))
    pairs = sum(1 for _ in read_records(files)) * kinds
    chosen = None
    if cap and pairs > cap:
        chosen = np.sort([shuffled(k, pairs, SEED) for k in range(cap)])
    for index, (where, record) in enumerate(read_records(files)):
        first = index * kinds
        if chosen is None:
            mine = range(kinds)
        else:
            mine = chosen[slice(*np.searchsorted(chosen, [first, first + kinds]))] - first
        for kind in map(int, mine):
            if templates:
                try:
                    sample = templates[kind].render(record, seed=first + kind)
                except UserError as error:
                    raise UserError(f"{where}: {error}") from None
            else:
                sample = _plain(where, record)
            if sample is not None:
                yield sample


def _plain(where: str, record: Mapping[str, object]) -> tuple[str, str]:
    text, target = record.get("text"), record.get("target")
    if not isinstance(text, str) or not isinstance(target, str):
        raise UserError(f"{where}: no text in fields 'text' and 'target': add them or give templates")
    return text, target


def _known(name: str, dataset: str) -> Dataset | None:
    if dataset and dataset not in DATASETS:
        known = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0)[0]
        raise UserError(f"data.instructions.{name}.dataset is {dataset!r}: did you mean {known}? Empty for another")
    return DATASETS.get(dataset)


def _templates(path: str, known: Dataset | None) -> list[Template]:
    """Read the templates at `path`, or a known data set's from its PromptSource folder below `path`."""
    if not path:
        return []
    root = Path(path).expanduser()
    inside = root / known.folder if known else root
    return read_templates(inside if inside.is_dir() else root)


def prepare(
    section: Mapping[str, InstructionSet], tokenizer: Tokenizer, cache: Cache
) -> tuple[dict[str, Instructions], dict[str, float]]:
    """Turn the config's section `data.instructions` into tokenised samples, through the cache.

    Args:
        section: entries by name.
        tokenizer: of the run.
        cache: gets one line to report for each set.

    Returns:
        The sets, for batches.Batches, and their weights. A set whose entry has no weight gets its number of samples. An
        example set that cannot be fetched is reported and left out.

    Raises:
        UserError: a file is missing or damaged, an example set is unknown, or a set has no samples.
    """
    sets: dict[str, Instructions] = {}
    weights: dict[str, float] = {}
    for name, entry in section.items():
        try:
            files = readers.find_files(entry.path) if entry.path else [instruction_samples.fetch(entry.sample, cache)]
        except samples.Unreachable as error:
            cache.report(f"instructions {name}: left out, {error}")
            continue
        known = _known(name, entry.dataset)
        templates = _templates(entry.templates, known)
        cap = entry.cap or (known.cap if known else 0)
        digest = hashlib.sha256(repr((FORMAT_VERSION, cap, tokenizer.digest)).encode())
        digest.update(repr([(template.jinja, template.answer_choices) for template in templates]).encode())
        for file in files:
            with open(file, "rb") as stream:
                digest.update(file.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        pairs = prompted(files, templates, cap)
        directory, _ = cache.made(
            "instructions", digest.hexdigest()[:32], functools.partial(write, prompts=pairs, tokenizer=tokenizer)
        )
        sets[name] = Instructions(directory)
        if not len(sets[name]):
            raise UserError(f"data.instructions.{name} has no samples: check its records and templates")
        weights[name] = entry.weight or float(len(sets[name]))
        cache.report(f"instructions {name}: {len(sets[name]):,} samples, {int(sets[name].lengths.sum()):,} tokens")
    return sets, weights
