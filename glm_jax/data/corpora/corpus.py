"""Turn files into distinct documents in hash order, split into documents to train on and held-out ones.

A corpus goes through two stages, of which shards.py makes the second. Each is a directory (prepare.py names it by its
content) of as many parts as the corpus's size needs. A part holds the documents whose digests fall in one range, so
parts are made independently and the corpus is in hash order, whichever files its documents came from.

    documents   part-00000-of-0000N/{documents.jsonl, sides.npy}; skipped.jsonl; index.json

While the documents stage is being made, read/<number>/ holds the documents of a file, or of a range of it, by part.
Everything is written under a temporary name first, so a killed stage resumes from what exists.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import itertools
import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import numpy as np

from glm_jax.data.corpora import deduplicate
from glm_jax.data.corpora.build import Workers
from glm_jax.data.corpora.deduplicate import StoredShingles, digest_of, distinct, near_duplicates, shingles, signature
from glm_jax.data.corpora.files import Found
from glm_jax.data.corpora.readers import is_compressed, lines_before, normaliser, ranges, read
from glm_jax.data.corpora.records import Damaged
from glm_jax.errors import UserError
from glm_jax.storage.files import atomic_directory, write_atomic
from glm_jax.types import Json

SPLITS = ("train", "heldout")
DUPLICATE = len(SPLITS)  # the value in sides.npy of a document in neither split
ALWAYS_HELD_OUT = 10  # a corpus of at least this many documents holds one out
PART_BYTES = 4_000_000  # of text, roughly, so that several workers share even a small source
MOST_PARTS = 512  # a worker keeps a file open for each, and holds one part in memory
SAMPLE = 200  # documents whose mean size tells how many there will be
WORTH_SAYING = 64_000_000  # bytes of memory
EXPANSION = 4  # text bytes per byte of a compressed file, roughly
PLACES = 1000  # damaged records that the index lists for each reason; skipped.jsonl lists all


@dataclass(frozen=True)
class Input:
    """What a source is read from.

    Attributes:
        found: the files, in reading order, and those that cannot be read.
        form, field, normalise: as in config.data.sources.
        where: the user's name for it.
    """

    found: Found
    form: str
    field: str = "text"
    normalise: str = ""
    where: str = ""


@dataclass(frozen=True)
class _ReadJob:
    source: Input
    file: Path
    range: tuple[int, int]  # of its bytes
    parts: int
    strict: bool
    directory: Path


@dataclass(frozen=True)
class _PartJob:
    files: tuple[Path, ...]  # what was read for this part
    signatures: bool
    directory: Path


def write_documents(
    directory: Path,
    source: Input,
    heldout: float,
    threshold: float,
    workers: Workers,
    *,
    strict: bool,
    report: Callable[[str], None],
) -> None:
    """Write the documents stage into a `directory` that may already hold pieces of it; see the module's docstring.

    The index has `documents` and `bytes` (of UTF-8 text) by split, `dropped` by kind of duplicate, and `skipped`: by
    reason, the count of damaged records, and file and line of the first PLACES.

    Args:
        heldout: expected share of held-out documents.
        threshold: similarity from which documents are duplicates; 0 drops only exact copies. Above 0, each document
            takes deduplicate.BYTES_A_DOCUMENT of memory.
        strict: stop at the first damaged record instead of counting it.
        report: told before the start how much memory that will be, if it is worth saying.

    Raises:
        UserError: there are no documents, or a record is damaged and `strict` is set.
    """
    if not (directory / "index.json").exists():
        if strict:
            source.found.check()
        found_sizes = {file: file.stat().st_size for file in source.found.files}
        file_bytes = sum(found_sizes.values())
        text_bytes = sum(size * _expansion(file, source.form) for file, size in found_sizes.items())
        if threshold:
            _say_memory(source, text_bytes, report)
        parts = max(1, min(MOST_PARTS, -(-text_bytes // PART_BYTES)))
        cut = max(PART_BYTES, file_bytes // MOST_PARTS)
        found = [(file, bounds) for file in source.found.files for bounds in ranges(file, source.form, cut)]
        sizes = [stop - start for _, (start, stop) in found]
        reads = [
            _ReadJob(source, file, bounds, parts, strict, directory / "read" / f"{number:06d}")
            for number, (file, bounds) in enumerate(found)
        ]
        workers.run(f"read {source.where}", _read, reads, sizes)
        files = [job.directory for job in reads]
        names = [_part_name(part, parts) for part in range(parts)]
        merges = [
            _PartJob(tuple(file / f"{name}.jsonl" for file in files), threshold > 0, directory / name) for name in names
        ]
        workers.run(f"sort {source.where}", _merge, merges, [text_bytes // parts] * parts)
        _finish_documents(directory, files, heldout, threshold, source)
    shutil.rmtree(directory / "read", ignore_errors=True)
    for part in part_folders(directory):
        for name in ("numbers.npz", "signatures.npy", "shingles.npy", "dropped.json"):
            (part / name).unlink(missing_ok=True)


def _expansion(file: Path, form: str) -> int:
    return EXPANSION if form == "parquet" or is_compressed(file) else 1


def _say_memory(source: Input, text_bytes: int, report: Callable[[str], None]) -> None:
    """Say how much memory near duplicates will take, from the mean size of the first documents."""
    first = itertools.islice(read(source.found.files[0], source.form, source.field), SAMPLE)
    sizes = [len(text.encode()) for text in first if isinstance(text, str)]
    documents = text_bytes * len(sizes) // max(1, sum(sizes))
    needed = documents * deduplicate.BYTES_A_DOCUMENT
    if needed >= WORTH_SAYING:
        report(
            f"{source.where}: about {documents:,} documents; to find near duplicates takes about "
            f"{needed / 1e9:.1f} GB of memory"
        )


def _read(job: _ReadJob) -> None:
    """Distribute the documents of one range of a file to the parts they belong to."""
    if job.directory.is_dir():
        if not job.strict or not (job.directory / "skipped.jsonl").stat().st_size:
            return
        shutil.rmtree(job.directory)  # left by a build that was not strict: find the damage again
    source, file = job.source, job.file
    before: int | None = None  # lines before the range, counted only if a message needs them
    normalise = normaliser(source.normalise)
    with atomic_directory(job.directory) as temporary, contextlib.ExitStack() as stack:
        skipped = stack.enter_context(_open_text(temporary / "skipped.jsonl"))
        opened: dict[int, TextIO] = {}
        for record in read(file, source.form, source.field, job.range):
            if isinstance(record, Damaged):
                before = lines_before(file, job.range[0]) if before is None else before
                record = dataclasses.replace(record, line=before + record.line)
                if job.strict:
                    raise UserError(f"{file}, line {record.line}: {record.message}")
                _write_line(skipped, _skipped_record(file, record))
                continue
            text = normalise(record)
            part = int.from_bytes(digest_of(text)[:8], "big") * job.parts >> 64
            if part not in opened:
                path = temporary / f"{_part_name(part, job.parts)}.jsonl"
                opened[part] = stack.enter_context(_open_text(path))
            _write_line(opened[part], text)


def _skipped_record(file: Path, damage: Damaged) -> Json:
    name = str(file).encode("utf-8", "backslashreplace").decode()  # a file's name need not be UTF-8
    return {"reason": damage.reason, "file": name, "line": damage.line, "message": damage.message}


def _merge(job: _PartJob) -> None:
    """Write the documents of one part in hash order, each once."""
    if job.directory.is_dir():
        return
    kept, dropped = distinct(_read_lines(path for path in job.files if path.exists()))
    numbers = {
        # Not the first bytes of the digest: those order the documents.
        "places": np.array([int.from_bytes(document.digest[16:24], "big") for document in kept], np.uint64),
        "sizes": np.array([len(document.text.encode()) for document in kept], np.int64),
    }
    with atomic_directory(job.directory) as temporary:
        if job.signatures:
            hashes = [shingles(document.text) for document in kept]
            numbers["shingles"] = np.array([len(own) for own in hashes], np.int64)
            save_array(temporary / "signatures.npy", np.array([signature(own) for own in hashes], np.uint32))
            save_array(temporary / "shingles.npy", np.concatenate([np.empty(0, np.uint32), *hashes]))
        with _open_text(temporary / "documents.jsonl") as file:
            for document in kept:
                _write_line(file, {"text": document.text})
        np.savez(temporary / "numbers.npz", **numbers)
        (temporary / "dropped.json").write_text(json.dumps(dropped))


def _finish_documents(directory: Path, files: list[Path], heldout: float, threshold: float, source: Input) -> None:
    """Drop near duplicates, split the rest, and write the index, which marks the stage as done."""
    parts = part_folders(directory)
    numbers = [_load_numbers(part) for part in parts]
    skipped, lines = _skipped(source.found, files)
    counts = [len(part["sizes"]) for part in numbers]
    if not sum(counts):
        damaged = sum(reason["count"] for reason in skipped.values())
        said = ""
        if damaged:
            first = json.loads(lines[: lines.index("\n")])
            place = f"{first['file']}, line {first['line']}: {first['message']}"
            said = f"; {damaged:,} damaged records were skipped, the first in {place}"
        raise UserError(f"corpus {source.where} is empty: it needs at least one line of text{said}")
    sides = _sides(parts, numbers, heldout, threshold)
    for part, own in zip(parts, np.split(sides, np.cumsum(counts)[:-1]), strict=True):
        buffer = io.BytesIO()
        np.save(buffer, own)
        write_atomic(part / "sides.npy", buffer.getvalue())
    sizes = np.concatenate([part["sizes"] for part in numbers])
    exact = sum(json.loads((part / "dropped.json").read_text()) for part in parts)
    write_atomic(directory / "skipped.jsonl", lines)
    write_index(
        directory,
        {
            "documents": {name: int((sides == side).sum()) for side, name in enumerate(SPLITS)},
            "bytes": {name: int(sizes[sides == side].sum()) for side, name in enumerate(SPLITS)},
            "dropped": {"exact": exact, "near": int((sides == DUPLICATE).sum())},
            "skipped": skipped,
        },
    )


def _sides(parts: list[Path], numbers: list[dict[str, np.ndarray]], heldout: float, threshold: float) -> np.ndarray:
    """Say of each document on which side of the split it is, or that it is a near duplicate."""
    places = np.concatenate([part["places"] for part in numbers])
    sides = np.full(len(places), DUPLICATE, np.uint8)
    if not threshold:
        sides[:] = split(places, heldout)
        return sides
    documents = StoredShingles([part / "shingles.npy" for part in parts], [part["shingles"] for part in numbers])
    signatures = np.empty((len(places), deduplicate.PERMUTATIONS), np.uint32)
    first = 0
    for part in parts:
        own = np.load(part / "signatures.npy", mmap_mode="r")
        signatures[first : first + len(own)] = own.reshape(-1, deduplicate.PERMUTATIONS)
        first += len(own)
    kept = np.flatnonzero(~near_duplicates(signatures, documents, threshold))
    sides[kept] = split(places[kept], heldout)
    # the search above misses some pairs; between the two sides there must be none
    train, held = (np.flatnonzero(sides == side).tolist() for side in range(len(SPLITS)))
    found = deduplicate.twins([documents[number] for number in held], map(documents.__getitem__, train), threshold)
    sides[list(itertools.compress(train, found))] = DUPLICATE
    return sides


def _load_numbers(part: Path) -> dict[str, np.ndarray]:
    with np.load(part / "numbers.npz") as archive:
        return dict(archive)


def _skipped(found: Found, files: list[Path]) -> tuple[Json, str]:
    """Return what is damaged by reason, and the lines of skipped.jsonl for all of it."""
    unread = "".join(_line(_skipped_record(file, damage)) for file, damage in found.skipped)
    lines = unread + "".join((file / "skipped.jsonl").read_text(encoding="utf-8") for file in files)
    skipped: Json = {}
    for record in map(json.loads, filter(None, lines.split("\n"))):
        reason = skipped.setdefault(record["reason"], {"count": 0, "places": []})
        reason["count"] += 1
        if reason["count"] <= PLACES:
            reason["places"].append({"file": record["file"], "line": record["line"]})
    return skipped, lines


def skipped_lines(index: Json) -> Iterator[str]:
    """Yield how many records an index says were left out for each reason, and where the first is."""
    for reason, skipped in index["skipped"].items():
        first = skipped["places"][0]
        yield f"{skipped['count']:,} {reason}, the first in {first['file']}, line {first['line']}"


def split(places: np.ndarray, heldout: float) -> np.ndarray:
    """Split documents by their own digests: a document stays in its split when others are added or removed.

    Args:
        places: uint64 [documents], from the digests.
        heldout: the expected share of held-out documents. Above 0, a corpus of ALWAYS_HELD_OUT documents or more holds
            out at least one. At least one document is for training.

    Returns:
        Indices into SPLITS, uint8 [documents].
    """
    limit = int(heldout * 2**64)
    if heldout and len(places) >= ALWAYS_HELD_OUT:
        limit = max(limit, int(places.min()) + 1)
    limit = min(limit, int(places.max()))
    return (places < np.uint64(limit)).astype(np.uint8)


def read_documents(directory: Path, split_name: str) -> Iterator[str]:
    """Yield the documents of one split of a documents stage, one at a time, in hash order."""
    for part in part_folders(directory):
        yield from part_documents(part, split_name)


def part_documents(part: Path, split_name: str) -> Iterator[str]:
    sides = np.load(part / "sides.npy")
    lines = _read_lines([part / "documents.jsonl"])
    for document, side in zip(lines, sides.tolist(), strict=True):
        if side == SPLITS.index(split_name):
            yield document["text"]


def _part_name(part: int, parts: int) -> str:
    return f"part-{part:05d}-of-{parts:05d}"


def part_folders(directory: Path) -> list[Path]:
    return sorted(directory.glob("part-*"))


def _open_text(path: Path) -> TextIO:
    return open(path, "w", encoding="utf-8", newline="\n")


def _write_line(file: TextIO, value: object) -> None:
    file.write(_line(value))


def _line(value: object) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"


def _read_lines(paths: Iterable[Path]) -> Iterator[Any]:  # JSON: texts in read/, objects in documents.jsonl
    for path in paths:
        with open(path, encoding="utf-8", newline="\n") as file:
            yield from map(json.loads, file)


def save_array(path: Path, array: np.ndarray) -> None:
    """Write a .npy file, as np.save does, but by Python: numpy's own error on a full disk does not say what it was."""
    with open(path, "wb") as file:
        np.lib.format.write_array_header_1_0(file, np.lib.format.header_data_from_array_1_0(array))
        file.write(np.ascontiguousarray(array).data)


def read_index(directory: Path) -> Json:
    """Read the index of a documents or shards directory."""
    return json.loads((directory / "index.json").read_text(encoding="utf-8"))


def write_index(directory: Path, index: Json) -> None:
    write_atomic(directory / "index.json", json.dumps(index, indent=2, ensure_ascii=False) + "\n")
