"""Instruction samples: turns records and templates into tokenised prompts with answers, for random access.

In GLM-130B's multi-task instruction pre-training (section 2.3 of arXiv 2210.02414), 5% of the rows hold prompted
samples of labelled data sets. A sample is stored as one document, `prompt [MASK] answer eos`, which
blanks.instruction_sample turns into a Sample. No text encodes to [MASK], so the first one in a document divides it.
"""

from __future__ import annotations

import difflib
import functools
import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_jax.config.data import InstructionSet
from glm_jax.data.corpora import readers, samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.corpora.corpus import PLACES, skipped_lines
from glm_jax.data.corpora.files import Found, find_files
from glm_jax.data.corpora.records import Damaged
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.registry import DATASETS, Dataset
from glm_jax.data.instructions.render import OVER_BUDGET, Answer, Refused, Render, answers, prompt
from glm_jax.data.instructions.templates import Template, read_templates
from glm_jax.data.rows.streams import shuffled
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.storage.files import json_line, open_regular
from glm_jax.types import Json

RECORDS = ("jsonl", "jsonl.zst", "json", "parquet")  # forms of files, and how their names end
WHOLE = "record"  # the field that holds a record which is an array, as C3's are
FORMAT_VERSION = 2  # raised when the same records give different tokens
SEED = 0  # of the choice of samples under a set's cap: the same in every run
MOST_EXCEEDING = 10  # records of a set that may exceed their budget, which takes seconds each


class Instructions:
    """The tokenised samples of one set, memory-mapped: `documents[i]` is int32 [n], prompt [MASK] answer eos.

    Attributes:
        lengths: int64 [documents], the tokens of each.
        index: what was made and what was left out; see `write`.
    """

    def __init__(self, directory: Path) -> None:
        """Open a directory that `write` filled."""
        self.lengths: np.ndarray = np.load(directory / "lengths.npy")
        self.index: Json = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        self._starts = np.cumsum(self.lengths) - self.lengths
        self._tokens = np.memmap(directory / "tokens.bin", "<i4", "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        start = self._starts[index]
        return np.array(self._tokens[start : start + self.lengths[index]], np.int32)


def encode(text: str, target: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenise a prompt and its answer separately: int32 [n], the tokenizer's prefix, prompt [MASK] answer eos."""
    if tokenizer.strips_before_blanks:
        prompt = text.rstrip()
        text, target = prompt, text[len(prompt) :] + target
    parts = [tokenizer.prefix, tokenizer.encode(text), [tokenizer.mask], tokenizer.encode(target), [tokenizer.eos]]
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")  # an empty prefix is float64


@dataclass(frozen=True)
class Place:
    """Where a record is: the line of a file, or the row."""

    file: Path
    line: int

    def __str__(self) -> str:
        return f"{self.file}, line {self.line}"


def write(
    directory: Path, found: Iterable[tuple[Place, Answer]], tokenizer: Tokenizer, name: str, *, strict: bool
) -> None:
    """Tokenise prompts and answers into an empty directory, for `Instructions`, and account for the rest.

    The index has `samples`; `unasked`, the pairs of a record and a template that has nothing to ask about it; and
    `skipped`: by reason, the count of what was left out, and file and line of the first PLACES. skipped.jsonl has all.

    Args:
        name: of the set, for messages.
        strict: stop at the first that has to be left out instead of counting it.

    Raises:
        UserError: something has to be left out and `strict` is set, or nothing is left.
    """
    lengths: list[int] = []
    skipped: dict[str, Json] = {}
    unasked, first = 0, ""
    with open(directory / "tokens.bin", "wb") as tokens, open(directory / "skipped.jsonl", "w") as left:
        for place, answer in found:
            if isinstance(answer, Refused):
                if strict:
                    raise UserError(f"{place}: {answer.message}")
                first = first or f": {place}: {answer.message}"
                _count(skipped.setdefault(answer.reason, {"count": 0, "places": []}), place)
                left.write(json_line({"reason": answer.reason, **_located(place), "message": answer.message}))
            elif answer is None:
                unasked += 1
            else:
                document = encode(*answer, tokenizer)
                tokens.write(document.astype("<i4").tobytes())
                lengths.append(len(document))
    if not lengths:
        said = first or (": no template asks about any of its records" if unasked else ": it has no records")
        raise UserError(f"data.instructions.{name} has no samples{said}")
    np.save(directory / "lengths.npy", np.array(lengths, np.int64))
    index = {"samples": len(lengths), "unasked": unasked, "skipped": skipped}
    (directory / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _count(reason: Json, place: Place) -> None:
    reason["count"] += 1
    if reason["count"] <= PLACES:
        reason["places"].append(_located(place))


def _located(place: Place) -> Json:
    # a file's name need not be UTF-8
    return {"file": str(place.file).encode("utf-8", "backslashreplace").decode(), "line": place.line}


def read_records(files: Iterable[Path], form: str = "") -> Iterator[tuple[Place, Json | Refused]]:
    """Yield the records of files with their places, in order; a damaged one is Refused, an array is the field WHOLE.

    Args:
        form: as in config.data.instructions; empty tells it by each file's name.

    Raises:
        UserError: a file of no known form, or a missing package.
    """
    for file in files:
        known = form or next((form for form in RECORDS if file.name.endswith(f".{form}")), "")
        if not known:
            raise UserError(f"{file} is not a file of records ({', '.join(RECORDS)}): set the set's `format`")
        for located in readers.read_records(file, known):
            if isinstance(located, Damaged):
                yield Place(file, located.line), Refused(located.reason, located.message)
            else:
                line, record = located
                yield Place(file, line), {WHOLE: record} if isinstance(record, list) else record


def prompted(
    files: Sequence[Path], templates: Sequence[Template], cap: int, form: str = ""
) -> Iterator[tuple[Place, Answer]]:
    """Yield what templates make of records, with the record's place: a prompt, None, or why there is none.

    Every pair of a record and a template is one sample. Of more than `cap` pairs, a fixed random choice of `cap` is
    taken. The files are then read twice, and never held in memory.

    Args:
        files: of records.
        templates: if empty, records must have `text` and `target`.
        cap: the most samples to take; 0 takes all.
        form: see `read_records`.

    Raises:
        UserError: as `read_records` and `render.answers`, or a template exceeds its budget MOST_EXCEEDING times.
    """
    exceeding = 0
    for place, answer in answers(_jobs(files, templates, cap, form)):
        exceeding += isinstance(answer, Refused) and answer.reason == OVER_BUDGET
        if isinstance(answer, Refused) and exceeding == MOST_EXCEEDING:
            raise UserError(f"{place}: {answer.message}; it is number {exceeding} of this set's records to do so")
        yield place, answer


def _jobs(
    files: Sequence[Path], templates: Sequence[Template], cap: int, form: str
) -> Iterator[tuple[Place, Render | Answer]]:
    kinds = max(1, len(templates))
    chosen = None
    if cap:
        pairs = sum(kinds for _, record in read_records(files, form) if not isinstance(record, Refused))
        if pairs > cap:
            chosen = np.sort([shuffled(k, pairs, SEED) for k in range(cap)])
    first = 0
    for place, record in read_records(files, form):
        if isinstance(record, Refused):
            yield place, record
            continue
        mine = range(kinds)
        if chosen is not None:
            mine = map(int, chosen[slice(*np.searchsorted(chosen, [first, first + kinds]))] - first)
        for kind in mine:
            yield place, templates[kind].job(record, first + kind) if templates else _plain(record)
        first += kinds


def _plain(record: Mapping[str, object]) -> Answer:
    text, target = record.get("text"), record.get("target")
    if not isinstance(text, str) or not isinstance(target, str):
        return Refused("missing field", "no text in fields 'text' and 'target': add them or give templates")
    return prompt(text, target)


def _known(name: str, dataset: str) -> Dataset | None:
    """Return the data set of a name, in which hyphens and underscores are the same."""
    if not dataset:
        return None
    names = {known.replace("-", "_"): known for known in DATASETS}
    if dataset.replace("-", "_") not in names:
        close = difflib.get_close_matches(dataset, DATASETS, n=1, cutoff=0)[0]
        raise UserError(f"data.instructions.{name}.dataset is {dataset!r}: did you mean {close}? Empty for another")
    return DATASETS[names[dataset.replace("-", "_")]]


def _templates(path: str, known: Dataset | None) -> list[Template]:
    """Read the templates at `path`, or a known data set's from its PromptSource folder below `path`."""
    if not path:
        return []
    root = Path(path).expanduser()
    inside = root / known.folder if known else root
    return read_templates(inside if inside.is_dir() else root)


def prepare(
    section: Mapping[str, InstructionSet], tokenizer: Tokenizer, cache: Cache, *, strict: bool = True
) -> tuple[dict[str, Instructions], dict[str, float]]:
    """Turn the config's section `data.instructions` into tokenised samples, through the cache.

    Args:
        section: entries by name.
        tokenizer: of the run.
        cache: gets one line to report for each set, and one for each reason for which records were left out.
        strict: stop at the first record that gives no prompt; otherwise count it and leave it out. What an earlier
            call made without `strict` is used unchanged.

    Returns:
        The sets, for batches.Batches, and their weights. A set whose entry has no weight gets its number of samples. An
        example set that cannot be fetched is reported and left out.

    Raises:
        UserError: a file is missing, an example set is unknown, a record gives no prompt, or a set has no samples.
    """
    sets: dict[str, Instructions] = {}
    weights: dict[str, float] = {}
    for name, entry in section.items():
        try:
            if entry.path:
                found = find_files(entry.path, "instructions")
            else:
                found = Found((instruction_samples.fetch(entry.sample, cache),))
        except samples.Unreachable as error:
            cache.report(f"instructions {name}: left out, {error}")
            continue
        found.check()
        files, form = found.files, entry.format if entry.path else "jsonl"
        known = _known(name, entry.dataset)
        templates = _templates(entry.templates, known)
        cap = entry.cap or (known.cap if known else 0)
        pairs = prompted(files, templates, cap, form)
        make = functools.partial(write, found=pairs, tokenizer=tokenizer, name=name, strict=strict)
        directory, _ = cache.made("instructions", _digest(files, form, templates, cap, tokenizer), make)
        made = sets[name] = Instructions(directory)
        weights[name] = entry.weight or float(len(made))
        asked = f", {made.index['unasked']:,} with nothing to ask" if made.index["unasked"] else ""
        cache.report(f"instructions {name}: {len(made):,} samples, {int(made.lengths.sum()):,} tokens{asked}")
        for line in skipped_lines(made.index):
            cache.report(f"instructions {name}: left out {line} ({directory}/skipped.jsonl)")
    return sets, weights


def _digest(files: Sequence[Path], form: str, templates: Sequence[Template], cap: int, tokenizer: Tokenizer) -> str:
    """Return the name of a set's directory: a digest of all that its content depends on."""
    digest = hashlib.sha256(repr((FORMAT_VERSION, form, cap, tokenizer.digest)).encode())
    digest.update(repr([(template.jinja, template.answer_choices) for template in templates]).encode())
    for file in files:
        try:
            with open_regular(file) as stream:
                digest.update(file.suffix.encode() + hashlib.file_digest(stream, "sha256").digest())
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror}") from None
    return digest.hexdigest()[:32]
