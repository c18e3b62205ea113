"""Read documents from files of text in several formats, and report damaged records."""

from __future__ import annotations

import io
import itertools
import json
import re
import unicodedata
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax.data.corpora import kinds, parquet
from glm_jax.data.corpora.compression import Broken, Decompressed
from glm_jax.data.corpora.json_array import Elements
from glm_jax.data.corpora.records import Damaged, Located
from glm_jax.errors import UserError
from glm_jax.storage.files import open_regular
from glm_jax.types import Json

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

LONGEST_RECORD = 64_000_000  # bytes; anything longer is hardly one document, and would fill a worker's memory
MOST_VALUES = 4_000_000  # in a record, by its brackets and commas: small ones take 50 times the memory of their text
PIECE = 1 << 20  # bytes of a line read at a time
# Between the ends that \n leaves in a line: carriage returns alone, and Unicode's next line
_BLANK_LINES = re.compile("[\r\x85]\\s*[\r\x85]")
LINED = ("text", "lines", "jsonl")  # the forms that can be read in ranges


def is_compressed(file: Path) -> bool:
    """Whether `read` decompresses the file, by its first bytes."""
    with open_regular(file) as stream:
        return bool(kinds.compression(stream.peek(kinds.HEAD)))


def ranges(file: Path, form: str, length: int) -> list[tuple[int, int]]:
    """Split a file into ranges of bytes, (start, stop), that `read` can read independently.

    Files of lines are split where a record ends, about every `length` bytes. Others and compressed ones are one range.
    """
    size = file.stat().st_size
    cuts = [0]
    if form in LINED:
        with open_regular(file) as stream:
            head = stream.peek(kinds.HEAD)[: kinds.HEAD]
            whole = kinds.compression(head) or kinds.other_kind(head, form)
            for place in range(length, 0 if whole else size, length):
                if place > cuts[-1]:
                    stream.seek(place)
                    _skip_record(stream, form)
                    cuts.append(stream.tell())
    cuts = [cut for cut in cuts if cut < size] or [0]
    return list(zip(cuts, [*cuts[1:], size], strict=True))


def _skip_record(stream: io.BufferedIOBase, form: str) -> None:
    """Move to the end of the line; in "text", to the end of the next blank line."""
    begins = False  # whether the next read starts a line
    while line := stream.readline(PIECE):
        ends = line.endswith(b"\n")
        if ends and (form != "text" or (begins and _is_blank(line))):
            return
        begins = ends


def _is_blank(line: bytes) -> bool:
    """Whether a line holds nothing but white space, of Unicode's kinds, too."""
    try:
        return not line.decode("utf-8").strip()
    except UnicodeDecodeError:
        return False


def lines_before(file: Path, place: int) -> int:
    """Return how many lines end before the byte `place`."""
    count = 0
    with open_regular(file) as stream:
        while place > 0 and (chunk := stream.read(min(1 << 20, place))):
            count += chunk.count(b"\n")
            place -= len(chunk)
    return count


def read(file: Path, form: str, field: str = "text", part: tuple[int, int] | None = None) -> Iterator[str | Damaged]:
    """Yield the documents of a file that are not blank, in file order, without holding the file in memory.

    A file compressed by gzip, bzip2, xz or zstd is decompressed, whatever its name. A file that is something else than
    `form`, by its first bytes, is one Damaged.

    Args:
        file: one of those that `find_files` returned.
        form: one of config.FORMATS. In "text" a blank line ends a document, and so does the end of the file.
        field: the key or column that holds the text. Several, separated by commas, are joined by newlines, those
            without text left out; a dot leads into a nested object.
        part: which of the file's `ranges` to read. Lines are counted from its start.

    Raises:
        UserError: as `read_records` does.
    """
    fields = [name.strip() for name in field.split(",")]
    if form in ("text", "lines"):
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
        file, form, part: as in `read`. A document of form "text" or "lines" is a record with the key "text". A record
            of JSON may also be an array.
        fields: the fields needed, for formats that can skip the others. Empty means all.

    Raises:
        UserError: the file cannot be opened or is a pipe or device, or the format's package is not installed.
    """
    try:
        with open_regular(file) as stream:
            head = stream.peek(kinds.HEAD)[: kinds.HEAD]
            if not head:
                yield Damaged("empty file", 1, "the file is empty: fetch it again or remove it")
            elif form == "parquet":
                yield from parquet.read(stream, head, fields)
            elif part is None or part[0] == 0:
                yield from _read_whole(stream, head, form, part)
            else:
                stream.seek(part[0])
                yield from _READERS[form](_limited(stream, part[1] - part[0]))
    except OSError as error:
        raise UserError(f"cannot read {file}: {error.strerror or error}") from None


def _read_whole(
    stream: io.BufferedReader, head: bytes, form: str, part: tuple[int, int] | None
) -> Iterator[Located | Damaged]:
    """Read a file, or its first range, as what it is."""
    name = kinds.compression(head) or ("zstd" if form == "jsonl.zst" else "")
    content = stream if part is None or name else _limited(stream, part[1])
    if name:
        content = io.BufferedReader(Decompressed(stream, name), PIECE)
        try:
            head = content.peek(1)[: kinds.HEAD]
        except Broken as error:
            yield Damaged(error.reason, 1, error.message)
            return
    if found := kinds.other_kind(head, form):
        yield Damaged("another kind of file", 1, found)
    else:
        yield from _READERS[form](content)


def _limited(stream: io.BufferedReader, size: int) -> io.BufferedReader:
    return io.BufferedReader(_Limited(stream, size), PIECE)


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

    def __init__(self, stream: io.BufferedIOBase, size: int) -> None:
        self._stream, self._left = stream, size

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer)
        data = self._stream.read(min(len(room), self._left))
        self._left -= len(data)
        room[: len(data)] = data
        return len(data)


def _lines(stream: io.BufferedIOBase) -> Iterator[tuple[int, bytes | bytearray | Damaged]]:
    """Yield (number from 1, line without its end), Damaged for a line too long or lost; drop a byte order mark."""
    number = 0
    try:
        while line := _next_line(stream):
            number += 1
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            fits = len(line) <= LONGEST_RECORD
            yield number, line.removesuffix(b"\n").removesuffix(b"\r") if fits else _too_long(number)
    except Broken as error:
        yield number + 1, Damaged(error.reason, number + 1, error.message)


def _next_line(stream: io.BufferedIOBase) -> bytes | bytearray:
    """Read a line with its end. Of one too long, return only the beginning, which is longer than LONGEST_RECORD."""
    line = stream.readline(PIECE)
    if len(line) < PIECE:
        return line
    whole = bytearray(line)  # which grows in place, where readline would hold a line twice
    while not whole.endswith(b"\n") and (line := stream.readline(PIECE)):
        if len(whole) <= LONGEST_RECORD:
            whole += line
        elif line.endswith(b"\n"):
            break
    return whole


def _too_long(number: int) -> Damaged:
    return Damaged("too long", number, f"over {LONGEST_RECORD // 1_000_000} MB in one record: split it")


def _decode(number: int, line: bytes | bytearray | Damaged) -> str | Damaged:
    if isinstance(line, Damaged):
        return line
    if b"\0" in line:
        return Damaged("NUL", number, f"a NUL byte at {line.index(0)}: remove it")
    try:
        return line.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"byte 0x{error.object[error.start]:02x} at {error.start}"
        return Damaged("invalid UTF-8", number, f"invalid UTF-8 ({byte}): convert the file to UTF-8")


def _read_text(stream: io.BufferedIOBase) -> Iterator[Located | Damaged]:
    document, start = bytearray(), 1  # so far, and its first line; not a list of lines, which may be many and small
    damage: Damaged | None = None  # the first in the document
    for number, raw in itertools.chain(_lines(stream), [(0, b"")]):  # the end of the file is one more blank line
        fits = isinstance(raw, Damaged) or len(document) + len(raw) <= LONGEST_RECORD
        line = _decode(number, raw if fits else _too_long(number))
        if isinstance(line, Damaged):
            damage = damage or line
            document.clear()
            continue
        for place, piece in enumerate(_pieces(line)):
            blank = not piece.strip()
            if (place or blank) and (document or damage):
                yield damage or (start, {"text": document.decode()})
                document.clear()
                damage = None
            if not blank and not damage:
                start = start if document else number
                document += (b"\n" if document else b"") + piece.encode()


def _pieces(line: str) -> Iterator[str]:
    """Yield what is between the blank lines inside a line, one at a time: there may be millions."""
    start = 0
    if "\r" in line or "\x85" in line:
        for blank in _BLANK_LINES.finditer(line):
            yield line[start : blank.start()]
            start = blank.end()
    yield line[start:]


def _read_lines(stream: io.BufferedIOBase) -> Iterator[Located | Damaged]:
    for number, line in _lines(stream):
        decoded = _decode(number, line)
        yield decoded if isinstance(decoded, Damaged) else (number, {"text": decoded})


def _read_jsonl(stream: io.BufferedIOBase) -> Iterator[Located | Damaged]:
    for number, line in _lines(stream):
        if isinstance(line, Damaged) or line.strip():
            yield _parse(number, line)


def _read_json(stream: io.BufferedIOBase) -> Iterator[Located | Damaged]:
    elements = Elements(stream, LONGEST_RECORD)
    try:
        for number, element in elements:
            yield _parse(number, _too_long(number) if element is None else element)
    except Broken as error:
        yield Damaged(error.reason, elements.line, error.message)
        return
    if not elements.begun:
        yield Damaged("broken JSON", 1, "not a JSON array: give another `format`, such as jsonl")
    elif not elements.closed:
        yield Damaged("truncated", elements.line, "the array has no end: fetch the file again")


def _parse(number: int, line: bytes | bytearray | Damaged) -> Located | Damaged:
    """Read one JSON object or array."""
    decoded = _decode(number, line)
    if isinstance(decoded, Damaged):
        return decoded
    if len(decoded) > MOST_VALUES and sum(map(decoded.count, ",[{")) > MOST_VALUES:
        return Damaged("too long", number, f"over {MOST_VALUES:,} values in one record: split it")
    try:
        record = json.loads(decoded)
    except RecursionError:
        return Damaged("too deep", number, "too many brackets inside each other: flatten or remove it")
    except ValueError as error:
        reason = error.msg if isinstance(error, json.JSONDecodeError) else str(error)
        return Damaged("broken JSON", number, f"broken JSON ({reason}): fix the line")
    return (number, record) if isinstance(record, dict | list) else _no_object(number, record)


def _no_object(number: int, value: object) -> Damaged:
    advice = "fix the line, or give another `format`"
    return Damaged("missing field", number, f"not a JSON object but {_kind_of(value)}: {advice}")


def _text_of(number: int, record: Json | list[Json], fields: Sequence[str]) -> str | Damaged:
    """Join the fields of a record that have text; see `read`."""
    if isinstance(record, list):
        return _no_object(number, record)
    texts: list[str] = []
    first: Damaged | None = None  # damage of a field, reported if no field has text
    for field in fields:
        text = _lookup(record, field)
        if isinstance(text, bytes):  # from parquet, where some writers do not say that it is text
            try:
                text = text.decode("utf-8")
            except UnicodeDecodeError:
                return Damaged("invalid UTF-8", number, f"bytes in {field!r} that are not UTF-8: convert them")
        if not isinstance(text, str):
            first = first or _without_text(number, record, field, text)
            continue
        if len(text) > LONGEST_RECORD:
            return _too_long(number)
        try:
            text.encode("utf-8")
        except UnicodeEncodeError:  # a lone escape such as "\ud800"
            return Damaged("invalid UTF-8", number, f"half a surrogate pair in {field!r}: fix it")
        if "\0" in text:
            return Damaged("NUL", number, f"a NUL character in {field!r}: remove it")
        texts.append(text)
    filled = [text for text in texts if text.strip()]
    return "\n".join(filled) if texts or first is None else first


def _without_text(number: int, record: Json, field: str, value: object) -> Damaged:
    """Say why there is no text in a field."""
    if value is not None:
        other = "name a field of text as the source's `field`"
        return Damaged("not text", number, f"no text in field {field!r} but {_kind_of(value)}: {other}")
    names = ", ".join(list(record)[:8])
    if field.partition(".")[0] in record:
        return Damaged("null", number, f"no text in field {field!r}, which is null: fill it or leave the record out")
    return Damaged("missing field", number, f"no text in field {field!r} among {names}: set the source's `field`")


def _kind_of(value: object) -> str:
    """Name the kind of a JSON value, or of another."""
    if isinstance(value, bool):
        return "true or false"
    names = {dict: "an object", list: "a list", str: "a string", int: "a number", float: "a number", type(None): "null"}
    return names.get(type(value), f"a {type(value).__name__}")


def _lookup(record: object, field: str) -> object:
    """Look a name up in a record: "a.b" is the key "a.b", or else the key "b" in the object "a"."""
    if not isinstance(record, dict):
        return None
    if field in record:
        return record[field]
    head, dot, rest = field.partition(".")
    return _lookup(record.get(head), rest) if dot else None


_READERS: dict[str, Callable[[io.BufferedIOBase], Iterator[Located | Damaged]]] = {
    "text": _read_text,
    "lines": _read_lines,
    "jsonl": _read_jsonl,
    "jsonl.zst": _read_jsonl,
    "json": _read_json,
}
