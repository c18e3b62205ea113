"""Instruction samples: turns records and templates into tokenised prompts with answers, for random access.

In GLM-130B's multi-task instruction pre-training (section 2.3 of arXiv 2210.02414), 5% of the rows hold prompted
samples of labelled data sets. A sample is stored as one document, `prompt [MASK] answer eos`, which
blanks.instruction_sample turns into a Sample, whose blank may be [gMASK]. No text encodes to [MASK], so the first one
in a document divides it.
"""

from __future__ import annotations

import dataclasses
import difflib
import functools
import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glm_jax.config.data import InstructionSet
from glm_jax.data.corpora import samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.corpora.corpus import PLACES, SPLITS, skipped_lines, split
from glm_jax.data.corpora.deduplicate import digest_of
from glm_jax.data.corpora.files import Found, find_files
from glm_jax.data.instructions import records
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.records import Asked, Place
from glm_jax.data.instructions.registry import DATASETS, Dataset
from glm_jax.data.instructions.render import OVER_BUDGET, Answer, Refused, Render, answers
from glm_jax.data.instructions.templates import Template, read_templates
from glm_jax.data.rows.streams import shuffled
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.storage.files import json_line, open_regular
from glm_jax.types import Json

FORMAT_VERSION = 3  # raised when the same records give different tokens
SEED = 0  # of the choice of samples under a set's cap: the same in every run
MOST_EXCEEDING = 10  # records of a set that may exceed their budget, which takes seconds each


class Instructions:
    """The tokenised samples of one side of a set, memory-mapped: `documents[i]` is int32 [n], prompt [MASK] answer eos.

    Attributes:
        lengths: int64 [documents], the tokens of each.
        index: what was made of the whole set and what was left out; see `write`.
    """

    def __init__(self, directory: Path, members: np.ndarray) -> None:
        """Open a directory that `write` filled.

        Args:
            members: bool [samples], those of this side.
        """
        lengths = np.load(directory / "lengths.npy")
        self.lengths: np.ndarray = lengths[members]
        self.index: Json = json.loads((directory / "index.json").read_text(encoding="utf-8"))
        self._starts = (np.cumsum(lengths) - lengths)[members]
        self._tokens = np.memmap(directory / "tokens.bin", "<i4", "r")

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int, /) -> np.ndarray:
        start = self._starts[index]
        return np.array(self._tokens[start : start + self.lengths[index]], np.int32)


@dataclass(frozen=True)
class Sides:
    """A set, split into samples to train on and held-out ones, all those of a record on one side.

    Attributes:
        train, heldout: the samples of each side that fit; there may be none held out.
        cut: how many of them have a prompt that is cut to fit.
        left_out: how many samples are on neither side, because their answers do not fit.
    """

    train: Instructions
    heldout: Instructions
    cut: int
    left_out: int


def open_sides(directory: Path, heldout: float, room: int, prefix: int = 0) -> Sides:
    """Open a directory that `write` filled.

    Args:
        heldout: expected share of held-out records; see corpus.split.
        room: places that a sample may fill in a row.
        prefix: tokens that stand before each prompt.
    """
    digests, side_of = np.unique(np.load(directory / "digests.npy"), return_inverse=True)
    sides = split(digests, heldout)[side_of]  # [samples]
    fits = prefix + np.load(directory / "answers.npy") + 2 <= room  # with the blank and eop
    cut = fits & (np.load(directory / "lengths.npy") > room)
    train, held = (Instructions(directory, fits & (sides == side)) for side in range(len(SPLITS)))
    return Sides(train, held, int(cut.sum()), int((~fits).sum()))


def encode(text: str, target: str, tokenizer: Tokenizer) -> np.ndarray:
    """Tokenise a prompt and its answer separately: int32 [n], the tokenizer's prefix, prompt [MASK] answer eos."""
    if tokenizer.strips_before_blanks:
        prompt = text.rstrip()
        text, target = prompt, text[len(prompt) :] + target
    parts = [tokenizer.prefix, tokenizer.encode(text), [tokenizer.mask], tokenizer.encode(target), [tokenizer.eos]]
    return np.concatenate(parts, dtype=np.int32, casting="unsafe")  # an empty prefix is float64


def write(
    directory: Path, found: Iterable[tuple[Place, Answer]], tokenizer: Tokenizer, name: str, *, strict: bool
) -> None:
    """Tokenise prompts and answers into an empty directory, for `Instructions`, and account for the rest.

    For each sample, lengths.npy has all its tokens, answers.npy those of its answer, and digests.npy its record's
    digest. The index has `samples`; `unasked`, the pairs of a record and a template that has nothing to ask about it;
    and `skipped`: by reason, the count of what was left out, and file and line of the first PLACES. skipped.jsonl has
    all.

    Args:
        name: of the set, for messages.
        strict: stop at the first that has to be left out instead of counting it.

    Raises:
        UserError: something has to be left out and `strict` is set, or nothing is left.
    """
    lengths, answer_lengths, digests = array("q"), array("q"), array("Q")
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
                divide = int(np.argmax(document == tokenizer.mask))
                lengths.append(len(document))
                answer_lengths.append(len(document) - divide - 2)
                digests.append(place.digest)
    if not lengths:
        said = first or (": no template asks about any of its records" if unasked else ": it has no records")
        raise UserError(f"data.instructions.{name} has no samples{said}")
    for file, numbers in (("lengths", lengths), ("answers", answer_lengths), ("digests", digests)):
        np.save(directory / f"{file}.npy", np.array(numbers))
    index = {"samples": len(lengths), "unasked": unasked, "skipped": skipped}
    (directory / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _count(reason: Json, place: Place) -> None:
    reason["count"] += 1
    if reason["count"] <= PLACES:
        reason["places"].append(_located(place))


def _located(place: Place) -> Json:
    # a file's name need not be UTF-8
    return {"file": str(place.file).encode("utf-8", "backslashreplace").decode(), "line": place.line}


def prompted(
    files: Sequence[Path], templates: Sequence[Template], cap: int, form: str = ""
) -> Iterator[tuple[Place, Answer]]:
    """Yield what templates make of records, with the record's place: a prompt, None, or why there is none.

    Every pair of a record and a template is one sample; without templates, every answer in a record. Of more than `cap`
    samples, a fixed random choice of `cap` is taken. The files are then read twice, and never held in memory.

    Args:
        files: of records.
        templates: if empty, records have a shape of records.py.
        cap: the most samples to take; 0 takes all.
        form: see `records.read_records`.

    Raises:
        UserError: as `records.read_records` and `render.answers`, or MOST_EXCEEDING records exceed their budget.
    """
    exceeding = 0
    for place, answer in answers(_jobs(files, templates, cap, form)):
        exceeding += isinstance(answer, Refused) and answer.reason == OVER_BUDGET
        if isinstance(answer, Refused) and exceeding == MOST_EXCEEDING:
            raise UserError(f"{place}: {answer.message}; it is number {exceeding} of this set's records to do so")
        yield place, answer


@dataclass(frozen=True)
class _Templated:
    """The samples of a record, one for each template."""

    record: Json
    templates: Sequence[Template]

    def __len__(self) -> int:
        return len(self.templates)

    def job(self, number: int, seed: int) -> Render:
        return self.templates[number].job(self.record, seed)

    def said(self) -> str:
        try:
            return json.dumps(self.record, sort_keys=True, default=repr)
        except RecursionError:  # no template reads a record as deep as this
            return ""


def _samples(
    files: Sequence[Path], templates: Sequence[Template], form: str
) -> Iterator[tuple[Place, Asked | _Templated | Refused]]:
    """Yield the samples of each record with its place."""
    for place, record in records.read_records(files, form):
        found = record
        if not isinstance(found, Refused):
            found = _Templated(found, templates) if templates else records.read(found)
        yield place, found


def _jobs(
    files: Sequence[Path], templates: Sequence[Template], cap: int, form: str
) -> Iterator[tuple[Place, Render | Answer]]:
    chosen = None
    if cap:
        count = sum(len(found) for _, found in _samples(files, templates, form) if not isinstance(found, Refused))
        if count > cap:
            chosen = np.sort([shuffled(k, count, SEED) for k in range(cap)])
    first = 0
    for place, found in _samples(files, templates, form):
        if isinstance(found, Refused):
            yield place, found
            continue
        mine = range(len(found))
        if chosen is not None:
            mine = map(int, chosen[slice(*np.searchsorted(chosen, [first, first + len(found)]))] - first)
        place = dataclasses.replace(place, digest=int.from_bytes(digest_of(found.said())[16:24], "big"))
        for number in mine:
            yield place, found.job(number, first + number)
        first += len(found)


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
    section: Mapping[str, InstructionSet], tokenizer: Tokenizer, cache: Cache, *, heldout: float, room: int,
    strict: bool = True,
) -> tuple[dict[str, Sides], dict[str, float]]:  # fmt: skip
    """Turn the config's section `data.instructions` into tokenised samples, through the cache.

    Args:
        section: entries by name.
        tokenizer: of the run.
        cache: gets one line to report for each set, one for each reason for which records were left out, and one if
            samples do not fit.
        heldout: share of each set's records to hold out.
        room: places that a sample may fill in a row.
        strict: stop at the first record that gives no prompt; otherwise count it and leave it out. What an earlier
            call made without `strict` is used unchanged.

    Returns:
        The sets, and the weights of those to train on. A set whose entry has no weight gets its number of samples to
        train on. An example set that cannot be fetched is reported and left out.

    Raises:
        UserError: a file is missing, an example set is unknown, a record gives no prompt, or a set has no samples, or
            none that fits.
    """
    sets: dict[str, Sides] = {}
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
        made = sets[name] = open_sides(directory, heldout, room, len(tokenizer.prefix))
        if not entry.score_only:
            weights[name] = entry.weight or float(len(made.train))
        _report(name, made, directory, heldout, room, cache, score_only=entry.score_only)
    return sets, weights


def _report(
    name: str, made: Sides, directory: Path, heldout: float, room: int, cache: Cache, *, score_only: bool
) -> None:
    """Say what a set holds and what was left out of it. Raise UserError if nothing is left of what it is for."""
    index, tokens = made.train.index, int(made.train.lengths.sum() + made.heldout.lengths.sum())
    few = " (too few records)" if heldout and not len(made.heldout) else ""
    asked = f", {index['unasked']:,} with nothing to ask" if index["unasked"] else ""
    cache.report(
        f"instructions {name}: {len(made.train):,} samples {'left alone' if score_only else 'to train on'}, "
        f"{len(made.heldout):,} held out{few}, "
        f"{tokens:,} tokens{asked}"
    )
    for line in skipped_lines(index):
        cache.report(f"instructions {name}: left out {line} ({directory}/skipped.jsonl)")
    if made.cut or made.left_out:
        cache.report(
            f"instructions {name}: {made.cut:,} prompts cut at their beginning, {made.left_out:,} samples left out "
            f"because their answers have over {room - 2} tokens; a sample has {room} places, which is data.seq_length "
            "divided by data.blanks.instruction_segments"
        )
    if score_only and not len(made.heldout):
        raise UserError(
            f"data.instructions.{name} is score_only, and none of its records is held out to be scored: raise "
            "data.heldout, or add records"
        )
    if not score_only and not len(made.train):
        raise UserError(
            f"data.instructions.{name} has no answer of at most {room - 2} tokens to train on: raise data.seq_length "
            "or lower data.blanks.instruction_segments"
        )


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
