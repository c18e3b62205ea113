"""Read documents from files of text in several formats, and report damaged records."""

from __future__ import annotations

import glob
import importlib
import io
import json
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any, BinaryIO

from glm_jax.data.corpora.json_array import Elements
from glm_jax.errors import UserError
from glm_jax.types import Json

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer
    from zstandard import ZstdDecompressor

LONGEST_RECORD = 64_000_000  # bytes; anything longer is hardly one document, and would fill a worker's memory
# The package that a format needs beyond our own dependencies, and the extra in setup.cfg that installs it.
PACKAGES = {"jsonl.zst": ("zstandard", "corpora"), "parquet": ("pyarrow", "parquet")}
ZSTANDARD_CHUNK = 1 << 14  # compressed bytes read at a time; a run of one character expands a thousandfold


@dataclass(frozen=True)
class Damaged:
    """A record that cannot be read.

    Attributes:
        reason: one of a few names, for counting.
        line: where the record starts or is broken, from 1. For parquet, the row.
        message: what is wrong and how to fix it, worded to follow "file, line n: ".
    """

    reason: str
    line: int
    message: str


Located = tuple[int, Json]  # line, or row, and the record


def find_files(path: str) -> list[Path]:
    """List the files that a source's `path` names, sorted, without a directory's hidden files.

    Args:
        path: a file, a directory (searched to any depth) or a glob.

    Raises:
        UserError: there is no such file.
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
            raise UserError(f"corpus {path} does not exist: give a file, a directory or a glob")
    return sorted(files)


def ranges(file: Path, form: str, length: int) -> list[tuple[int, int]]:
    """Split a file into ranges of bytes, (start, stop), that `read` can read independently.

    Files of lines are split where a record ends, about every `length` bytes. Files of other forms are one range.
    """
    size = file.stat().st_size
    cuts = [0]
    if form in ("text", "jsonl"):
        with open(file, "rb") as stream:
            for place in range(length, size, length):
                if place > cuts[-1]:
                    stream.seek(place)
                    _skip_record(stream, form)
                    cuts.append(stream.tell())
    cuts = [cut for cut in cuts if cut < size] or [0]
    return list(zip(cuts, [*cuts[1:], size], strict=True))


def _skip_record(stream: BinaryIO, form: str) -> None:
    """Move to the end of the line; in "text", to the end of the next blank line."""
    begins = False  # whether the next read starts a line
    while line := stream.readline(1 << 20):
        ends = line.endswith(b"\n")
        if ends and (form != "text" or (begins and not line.strip())):
            return
        begins = ends


def lines_before(file: Path, place: int) -> int:
    """Return how many lines end before the byte `place`."""
    count = 0
    with open(file, "rb") as stream:
        while place > 0 and (chunk := stream.read(min(1 << 20, place))):
            count += chunk.count(b"\n")
            place -= len(chunk)
    return count


def read(file: Path, form: str, field: str = "text", part: tuple[int, int] | None = None) -> Iterator[str | Damaged]:
    """Yield the documents of a file that are not blank, in file order, without holding the file in memory.

    Args:
        file: one of those that `find_files` returned.
        form: one of config.FORMATS. In "text" a blank line ends a document, and so does the end of the file.
        field: the key or column that holds the text. Several, separated by commas, are joined by newlines; a dot
            leads into a nested object.
        part: which of the file's `ranges` to read. Lines are counted from its start.

    Raises:
        UserError: as `read_records` does.
    """
    fields = [name.strip() for name in field.split(",")]
    if form == "text":
        fields = ["text"]
    for located in read_records(file, form, fields, part):
        document = located if isinstance(located, Damaged) else _text_of(*located, fields)
        if isinstance(document, Damaged) or document.strip():
            yield document


def read_records(
    file: Path, form: str, fields: Sequence[str] = (), part: tuple[int, int] | None = None
) -> Iterator[Located | Damaged]:
    """Yield the records of a file with their lines, and the damaged ones as Damaged; see `read`.

    Args:
        file, form, part: as in `read`. A document of form "text" is a record with the key "text".
        fields: the fields needed, for formats that can skip the others. Empty means all.

    Raises:
        UserError: the file cannot be opened, the format's package is not installed, or a parquet column is missing.
    """
    try:
        with open(file, "rb") as stream:
            if not stream.peek(1):
                yield Damaged("empty file", 1, "the file is empty: fetch it again or remove it")
            elif form == "parquet":
                yield from _read_parquet(file, stream, fields)
            elif part is None:
                yield from _READERS[form](stream)
            else:
                stream.seek(part[0])
                yield from _READERS[form](io.BufferedReader(_Limited(stream, part[1] - part[0]), 1 << 20))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def normaliser(options: str) -> Callable[[str], str]:
    """Return the function that a source's `normalise` key names.

    Args:
        options: names separated by commas: "nfc" and "nfkc" are the Unicode forms, "newlines" turns \\r\\n and \\r
            into \\n. Empty leaves text unchanged.
    """
    names = {name.strip() for name in options.split(",")}

    def normalise(text: str) -> str:
        if "newlines" in names:
            text = text.replace("\r\n", "\n").replace("\r", "\n")
        if "nfkc" in names:
            return unicodedata.normalize("NFKC", text)
        return unicodedata.normalize("NFC", text) if "nfc" in names else text

    return normalise


class _Limited(io.RawIOBase):
    """A stream of the next `size` bytes of another."""

    def __init__(self, stream: BinaryIO, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer)
        data = self._stream.read(min(len(room), self._left))
        self._left -= len(data)
        room[: len(data)] = data
        return len(data)


def _lines(stream: BinaryIO) -> Iterator[tuple[int, bytes | None]]:
    """Yield (number from 1, line without its end), None for a line too long; drop a byte order mark."""
    number = 0
    while line := stream.readline(LONGEST_RECORD + 2):
        number += 1
        if len(line) > LONGEST_RECORD and not line.endswith(b"\n"):
            while (rest := stream.readline(1 << 20)) and not rest.endswith(b"\n"):
                pass
            yield number, None
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        yield number, line.removesuffix(b"\n").removesuffix(b"\r")


def _decode(number: int, line: bytes | None) -> str | Damaged:
    if line is None:
        return Damaged("too long", number, f"over {LONGEST_RECORD // 1_000_000} MB in one record: split it")
    if b"\0" in line:
        return Damaged("NUL", number, f"a NUL byte at {line.index(0)}: remove it")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        return Damaged("invalid UTF-8", number, f"invalid UTF-8 ({byte}): convert the file to UTF-8")


def _read_text(stream: BinaryIO) -> Iterator[Located | Damaged]:
    document: list[str] = []
    size, damage, number = 0, None, 0  # of the document so far: its size, and the first damage in it
    for number, raw in _lines(stream):
        if raw is not None and not raw.strip():
            if document or damage:
                yield damage or (number - len(document), {"text": "\n".join(document)})
            document, size, damage = [], 0, None
            continue
        size += len(raw or b"") + 1
        line = _decode(number, raw if size <= LONGEST_RECORD else None)
        if damage or isinstance(line, Damaged):
            damage = damage or (line if isinstance(line, Damaged) else None)
            document.clear()
        else:
            document.append(line)
    if document or damage:
        yield damage or (number - len(document) + 1, {"text": "\n".join(document)})


def _read_jsonl(stream: BinaryIO) -> Iterator[Located | Damaged]:
    for number, line in _lines(stream):
        if line is None or line.strip():
            yield _parse(number, line)


def _read_json(stream: BinaryIO) -> Iterator[Located | Damaged]:
    elements = Elements(stream, LONGEST_RECORD)
    for number, element in elements:
        yield _parse(number, element)
    if not elements.begun:
        yield Damaged("broken JSON", 1, "not a JSON array: give another `format`, such as jsonl")
    elif not elements.closed:
        yield Damaged("truncated", elements.line, "the array has no end: fetch the file again")


def _parse(number: int, line: bytes | None) -> Located | Damaged:
    """Read one JSON object."""
    decoded = _decode(number, line)
    if isinstance(decoded, Damaged):
        return decoded
    try:
        record = json.loads(decoded)
    except (ValueError, RecursionError) as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return Damaged("broken JSON", number, f"broken JSON ({reason}): fix the line")
    if not isinstance(record, dict):
        return Damaged("missing field", number, "not a JSON object: fix the line, or give another `format`")
    return number, record


def _text_of(number: int, record: Json, fields: Sequence[str]) -> str | Damaged:
    """Join the fields of a record; see `read`."""
    texts = []
    for field in fields:
        text = _lookup(record, field)
        if not isinstance(text, str):
            return Damaged("missing field", number, f"no text in field {field!r}: set the source's `field`")
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone escape such as "\ud800"
            return Damaged("invalid UTF-8", number, f"half a surrogate pair in {field!r}: fix it")
        if "\0" in text:
            return Damaged("NUL", number, f"a NUL character in {field!r}: remove it")
        texts.append(text)
    return "\n".join(texts)


def _lookup(record: object, field: str) -> object:
    """Look a name up in a record: "a.b" is the key "a.b", or else the key "b" in the object "a"."""
    if not isinstance(record, dict):
        return None
    if field in record:
        return record[field]
    head, dot, rest = field.partition(".")
    return _lookup(record.get(head), rest) if dot else None


class _Decompressed(io.RawIOBase):
    """The content of a zstd file of one or more frames. Raises EOFError if the file ends in mid-frame."""

    def __init__(self, stream: BinaryIO, decompressor: ZstdDecompressor) -> None:
        self._stream, self._decompressor = stream, decompressor
        self._frame = decompressor.decompressobj()
        self._begun = False
        self._ready = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        while not self._ready:
            data = self._stream.read(ZSTANDARD_CHUNK) if not self._frame.unused_data else self._frame.unused_data
            if self._frame.eof:
                self._frame, self._begun = self._decompressor.decompressobj(), False
            if not data:
                if self._begun:
                    raise EOFError
                return 0
            self._begun = True
            self._ready = memoryview(self._frame.decompress(data))
        room = memoryview(buffer)
        size = min(len(room), len(self._ready))
        room[:size] = self._ready[:size]
        self._ready = self._ready[size:]
        return size


def _read_zstandard(stream: BinaryIO) -> Iterator[Located | Damaged]:
    zstandard = _import_package("jsonl.zst", "zstandard")
    content = io.BufferedReader(_Decompressed(stream, zstandard.ZstdDecompressor()), 1 << 20)
    number = 0
    try:
        for number, line in _lines(content):
            if line is None or line.strip():
                yield _parse(number, line)
    except EOFError:
        yield Damaged("truncated", number + 1, "the zstd file ends too early: fetch it again")
    except zstandard.ZstdError as error:
        yield Damaged("unreadable", number + 1, f"not a whole zstd file ({error}): fetch it again")


def _read_parquet(file: Path, stream: BinaryIO, fields: Sequence[str]) -> Iterator[Located | Damaged]:
    parquet = _import_package("parquet", "pyarrow.parquet")
    try:
        table = parquet.ParquetFile(stream)
    except (ValueError, OSError) as error:  # ValueError: pyarrow.ArrowInvalid
        yield Damaged("unreadable", 1, f"not a parquet file ({str(error).splitlines()[0]}): fetch it again")
        return
    names = table.schema_arrow.names
    for field in fields:
        if field not in names and field.partition(".")[0] not in names:
            raise UserError(f"{file} has no column {field!r}: set the source's `field` to one of {', '.join(names)}")
    columns = (fields or None) and [field if field in names else field.partition(".")[0] for field in fields]
    before = 0
    for group in range(table.num_row_groups):
        number = before
        try:
            for batch in table.iter_batches(batch_size=1024, row_groups=[group], columns=columns):
                for row in range(batch.num_rows):
                    number += 1
                    yield _parquet_row(number, batch, row)
        except (ValueError, OSError) as error:
            yield Damaged(
                "unreadable", number + 1, f"damaged rows ({str(error).splitlines()[0]}): fetch the file again"
            )
        before += table.metadata.row_group(group).num_rows


def _parquet_row(number: int, batch: Any, row: int) -> Located | Damaged:  # a pyarrow.RecordBatch: pyarrow has no types
    try:
        return number, {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Damaged("invalid UTF-8", number, "invalid UTF-8: convert the column to UTF-8")


def _import_package(form: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        package, extra = PACKAGES[form]
        raise UserError(f"reading {form} needs the package {package}: pip install -e '.[{extra}]'") from None


_READERS = {"text": _read_text, "jsonl": _read_jsonl, "jsonl.zst": _read_zstandard, "json": _read_json}
