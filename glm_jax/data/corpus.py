"""From files to tokenised shards: readers, the split by hash, ArrayRecord files of token ids.

A corpus passes two stages, each a directory (prepare.py names them by their content):

    documents   {train,heldout}.jsonl with {"text": ...} a line, duplicates removed, in hash order; index.json
    shards      {train,heldout}-00000-of-0000N.array_record, {train,heldout}-lengths.npy; index.json
"""

from __future__ import annotations

import dataclasses
import glob
import importlib
import io
import itertools
import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter
from grain.sources import ArrayRecordDataSource

from glm_jax.data.deduplicate import Kept, deduplicate
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError

SPLITS = ("train", "heldout")
ALWAYS_HELD_OUT = 10  # a corpus of at least this many documents has a held-out one
SHARD_BYTES = 256_000_000  # of text, a shard
PACKAGES = {"jsonl.zst": "zstandard", "parquet": "pyarrow"}  # what a format needs beyond our own dependencies


def find_files(path: str) -> list[Path]:
    """List the files that a source's `path` names, sorted; a directory's hidden files are left out.

    Args:
        path: a file, a directory (searched to any depth) or a glob.

    Raises:
        UserError: no file is there.
    """
    root = Path(path).expanduser()
    if root.is_file():
        return [root]
    if root.is_dir():
        inside = [file.relative_to(root) for file in root.rglob("*") if file.is_file()]
        files = [root / file for file in inside if not any(part.startswith(".") for part in file.parts)]
        if not files:
            raise UserError(f"corpus {path} is a directory without files: put text there")
    else:
        files = [Path(name) for name in glob.glob(str(root), recursive=True) if Path(name).is_file()]
        if not files:
            raise UserError(f"corpus {path} is not there: give a file, a directory or a glob")
    return sorted(files)


def read(files: Iterable[Path], form: str, field: str = "text") -> Iterator[str]:
    """Yield the documents of a source that have any text, in file order, without holding a file in memory.

    Args:
        files: what `find_files` gave.
        form: one of config.FORMATS. In "text" a blank line ends a document, and so does the end of a file.
        field: the key (jsonl) or column (parquet) that holds the text.

    Raises:
        UserError: a file that cannot be read; invalid UTF-8, broken JSON or a missing field, with file and
            line; a format whose package is not installed.
    """
    for file in files:
        try:
            with open(file, "rb") as stream:
                for document in _READERS[form](file, stream, field):
                    if document.strip():
                        yield document
        except OSError as error:
            raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def _lines(file: Path, stream: BinaryIO) -> Iterator[tuple[int, str]]:
    """Yield (line number from 1, line without its end); a byte order mark is dropped."""
    for number, line in enumerate(stream, 1):
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            yield number, line.removesuffix(b"\n").removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError as error:
            raise UserError(
                f"{file}, line {number}: invalid UTF-8 (byte 0x{error.object[error.start]:02x} "
                f"at {error.start}): convert the file to UTF-8"
            ) from None


def _read_text(file: Path, stream: BinaryIO, _field: str) -> Iterator[str]:
    document: list[str] = []
    for _, line in _lines(file, stream):
        if line.strip():
            document.append(line)
        elif document:
            yield "\n".join(document)
            document = []
    if document:
        yield "\n".join(document)


def _read_jsonl(file: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    for number, line in _lines(file, stream):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
            raise UserError(f"{file}, line {number}: broken JSON ({reason}): mend the line") from None
        text = record.get(field) if isinstance(record, dict) else None
        if not isinstance(text, str):
            raise UserError(f"{file}, line {number}: no text in field {field!r}: set the source's `field`")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # an escape such as "\ud800" alone
            raise UserError(f"{file}, line {number}: half a surrogate pair in {field!r}: mend it") from None
        yield text


def _read_zstandard(file: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    zstandard = _import_package("jsonl.zst", "zstandard")
    reader = zstandard.ZstdDecompressor().stream_reader(stream, read_across_frames=True)
    try:
        yield from _read_jsonl(file, io.BufferedReader(reader, 1 << 20), field)
    except zstandard.ZstdError as error:
        raise UserError(f"{file} is not a whole zstd file ({error}): fetch it again") from None


def _read_parquet(file: Path, stream: BinaryIO, field: str) -> Iterator[str]:
    parquet = _import_package("parquet", "pyarrow.parquet")
    try:
        table = parquet.ParquetFile(stream)
    except ValueError as error:  # pyarrow.ArrowInvalid
        raise UserError(f"{file} is not a parquet file ({str(error).splitlines()[0]})") from None
    if field not in table.schema_arrow.names:
        names = ", ".join(table.schema_arrow.names)
        raise UserError(f"{file} has no column {field!r}: set the source's `field` to one of {names}")
    batches = table.iter_batches(batch_size=1024, columns=[field])
    for number, text in enumerate((row for batch in batches for row in batch.to_pydict()[field]), 1):
        if not isinstance(text, str):
            raise UserError(f"{file}, row {number}: no text in column {field!r}: set the source's `field`")
        yield text


def _import_package(form: str, module: str) -> Any:
    try:
        return importlib.import_module(module)
    except ImportError:
        package = PACKAGES[form]
        raise UserError(f"reading {form} needs the package {package}: pip install {package}") from None


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "jsonl.zst": _read_zstandard, "parquet": _read_parquet}


def split(documents: list[Kept], heldout: float) -> dict[str, list[Kept]]:
    """Split documents by their own digest: a document stays on its side when others come and go.

    Args:
        documents: distinct documents, in hash order.
        heldout: the expected share of held-out ones. Above 0, a corpus of ALWAYS_HELD_OUT documents or more
            has one at least; at least one document is for training.

    Returns:
        "train" and "heldout", each in the order of `documents`.
    """
    # Not the first bytes of the digest: the order, and which of several duplicates stays, hang on them.
    places = [int.from_bytes(document.digest[16:24], "big") / 2**64 for document in documents]
    limit = heldout
    if heldout and len(documents) >= ALWAYS_HELD_OUT:
        limit = max(limit, np.nextafter(min(places), 2))
    limit = min(limit, max(places))
    sides: dict[str, list[Kept]] = {name: [] for name in SPLITS}
    for document, place in zip(documents, places, strict=True):
        sides["heldout" if place < limit else "train"].append(document)
    return sides


def write_documents(
    directory: Path, texts: Iterable[str], heldout: float, near_duplicates: float, where: str
) -> dict[str, Any]:
    """Write the documents stage into an empty `directory`; see the module's docstring.

    Args:
        texts: documents in any order; the distinct ones are held in memory once.
        heldout, near_duplicates: the values of config.data.
        where: what the user calls the corpus, for the message.

    Returns:
        The index: per split `documents` and `bytes` (of UTF-8 text), and `dropped` by reason.

    Raises:
        UserError: there is no document.
    """
    kept, dropped = deduplicate(texts, near_duplicates)
    if not kept:
        raise UserError(f"corpus {where} is empty: it needs at least one line of text")
    index: dict[str, Any] = {"documents": {}, "bytes": {}, "dropped": dataclasses.asdict(dropped)}
    for name, documents in split(kept, heldout).items():
        with open(directory / f"{name}.jsonl", "w", encoding="utf-8", newline="\n") as file:
            for document in documents:
                file.write(json.dumps({"text": document.text}, ensure_ascii=False) + "\n")
        index["documents"][name] = len(documents)
        index["bytes"][name] = sum(len(document.text.encode()) for document in documents)
    _write_index(directory, index)
    return index


def write_shards(directory: Path, documents: Path, tokenizer: Tokenizer, source: str) -> dict[str, Any]:
    """Tokenise a documents stage into an empty `directory`: a record is one document's ids, then eos.

    Args:
        documents: a directory that `write_documents` filled. Its documents are read one at a time.
        source: the source's name, for the index.

    Returns:
        The index: what the documents' index says, with `tokens` per split (eos included), `source`,
        `tokenizer` (digest) and `dtype` of the records (little-endian).
    """
    index = read_index(documents)
    dtype = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
    index |= {"tokens": {}, "source": source, "tokenizer": tokenizer.digest, "dtype": dtype}
    for name in SPLITS:
        count = index["documents"][name]
        shards = min(count, -(-index["bytes"][name] // SHARD_BYTES))
        texts = read([documents / f"{name}.jsonl"], "jsonl")
        lengths: list[int] = []
        for shard in range(shards):
            share = count * (shard + 1) // shards - count * shard // shards
            # One record a group: any document is then read without its neighbours.
            writer = ArrayRecordWriter(str(directory / _shard_name(name, shard, shards)), "group_size:1")
            for text in itertools.islice(texts, share):
                ids = np.append(tokenizer.encode(text), tokenizer.eos)  # [S]
                writer.write(ids.astype(dtype).tobytes())
                lengths.append(len(ids))
            writer.close()
        np.save(directory / f"{name}-lengths.npy", np.array(lengths, np.int64))
        index["tokens"][name] = sum(lengths)
    _write_index(directory, index)
    return index


def _shard_name(split_name: str, shard: int, shards: int) -> str:
    return f"{split_name}-{shard:05d}-of-{shards:05d}.array_record"


def read_index(directory: Path) -> dict[str, Any]:
    """Read the index of a documents or shards directory."""
    return json.loads((directory / "index.json").read_text(encoding="utf-8"))


def _write_index(directory: Path, index: dict[str, Any]) -> None:
    text = json.dumps(index, indent=2, ensure_ascii=False) + "\n"
    (directory / "index.json").write_text(text, encoding="utf-8")


class Shards:
    """The tokenised documents of one split, read lazily: `shards[i]` is int32 [S], eos last. Picklable.

    Attributes:
        lengths: int64 [documents], tokens a document, eos included.
    """

    def __init__(self, paths: list[Path], lengths: np.ndarray, dtype: str):
        self.lengths = lengths
        self._dtype = np.dtype(dtype)
        self._records = ArrayRecordDataSource([str(path) for path in paths]) if paths else None

    @classmethod
    def open(cls, directory: Path, split_name: str) -> Shards:
        """Open the split "train" or "heldout" of a directory that `write_shards` filled; it may be empty."""
        index = read_index(directory)
        paths = sorted(directory.glob(f"{split_name}-*.array_record"))
        return cls(paths, np.load(directory / f"{split_name}-lengths.npy"), index["dtype"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._records is None or not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)  # [S]
