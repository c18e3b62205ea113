"""Read how large the pages of a parquet file are, before pyarrow makes room for them.

A page is decompressed as a whole, and its header alone says to how many bytes; pyarrow believes it and shows it to
nobody. Where the pages lie is in the file's footer, but pyarrow's Python classes end the process when some of it is
damaged, which its reader refuses. Both are structs in Thrift's compact protocol, of which this reads what occurs in
them (parquet.thrift of apache/parquet-format).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

_SIZE, _COMPRESSED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of a header; the last two are structs
_VALUES = 1  # the field of these structs that counts values
_GROUPS, _COLUMNS, _ABOUT = 4, 1, 3  # the fields that lead from a footer to what it says of a chunk:
_LENGTH, _DATA_AT, _DICTIONARY_AT = 7, 9, 11
_DEEPEST = 12  # structs and lists inside each other
_LONGEST_BYTES = 1 << 31  # of text in a header; from Thrift's own limit on
_LONGEST_NUMBER = 10  # bytes of a variable-length integer

_Value = int | dict[int, "_Value"] | list["_Value"]


@dataclass(frozen=True)
class Page:
    """What a page's header says.

    Attributes:
        compressed, size: bytes in the file, and decompressed.
        values: how many it holds; 1 in a dictionary, each value of which may stand in every row.
    """

    compressed: int
    size: int
    values: int


@dataclass(frozen=True)
class Chunk:
    """Where the pages of one column in one group of rows lie, in bytes of the file."""

    start: int
    length: int


def chunks(stream: io.BufferedIOBase) -> list[list[Chunk]]:
    """Read a file's footer: the columns of each group of rows. The stream's position is moved.

    Raises:
        ValueError: it is damaged.
        OSError: the file cannot be read there.
    """
    stream.seek(-8, os.SEEK_END)
    stream.seek(-8 - int.from_bytes(stream.read(4), "little"), os.SEEK_END)
    groups = _list(_struct(stream, 0), _GROUPS)
    return [[_chunk(column) for column in _list(group, _COLUMNS)] for group in groups]


def _list(value: _Value, field: int) -> list[_Value]:
    found = value.get(field) if isinstance(value, dict) else None
    if not isinstance(found, list):
        raise ValueError("a damaged header or footer")
    return found


def _chunk(column: _Value) -> Chunk:
    about = column.get(_ABOUT) if isinstance(column, dict) else None
    if not isinstance(about, dict):
        raise ValueError("a damaged header or footer")
    start = _number(about, _DATA_AT)
    if about.get(_DICTIONARY_AT):  # 0 where a writer has none to name
        start = min(start, _number(about, _DICTIONARY_AT))
    return Chunk(start, _number(about, _LENGTH))


def pages(stream: io.BufferedIOBase, start: int, length: int) -> Iterator[Page]:
    """Yield the pages of a column chunk, without reading their content.

    Args:
        stream: the file; its position is moved.
        start, length: where the chunk lies, in bytes.

    Raises:
        ValueError: a header is damaged.
        OSError: the file cannot be read there.
    """
    stop, end = start + length, stream.seek(0, os.SEEK_END)
    while start < stop:
        stream.seek(start)
        header = _struct(stream, 0)
        size, compressed = _number(header, _SIZE), _number(header, _COMPRESSED)
        data = header.get(_DATA, header.get(_DATA_V2))
        start = stream.tell() + compressed
        if start > end:  # not `stop`: old writers forgot the bytes of a header
            raise ValueError("a page larger than the file")
        yield Page(compressed, size, _number(data, _VALUES) if isinstance(data, dict) else 1)


def _number(struct: dict[int, _Value], field: int) -> int:
    value = struct.get(field)
    if not isinstance(value, int) or value < 0:
        raise ValueError("a damaged header or footer")
    return value


def _struct(stream: io.BufferedIOBase, depth: int) -> dict[int, _Value]:
    """Read a struct: its values by field."""
    fields: dict[int, _Value] = {}
    field = 0
    while byte := _byte(stream):
        delta, kind = byte >> 4, byte & 15
        field = field + delta if delta else _signed(stream)
        fields[field] = kind == 1 if kind in (1, 2) else _value(stream, kind, depth)  # true and false have no content
    return fields


def _value(stream: io.BufferedIOBase, kind: int, depth: int) -> _Value:
    if kind in (1, 2, 3):  # bools in a list, integers of 8 bits
        return _byte(stream)
    if kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
        return _signed(stream)
    if kind in (7, 8):  # doubles, bytes: of no use here
        size = min(8 if kind == 7 else _unsigned(stream), _LONGEST_BYTES)
        if size:
            stream.seek(size - 1, os.SEEK_CUR)
            _byte(stream)  # the last one is there: else a short file could ask for endless work
        return size
    if kind == 9 and depth < _DEEPEST:  # lists
        byte = _byte(stream)
        size = byte >> 4 if byte >> 4 < 15 else _unsigned(stream)
        return [_value(stream, byte & 15, depth + 1) for _ in range(min(size, _LONGEST_BYTES))]
    if kind == 12 and depth < _DEEPEST:
        return _struct(stream, depth + 1)
    raise ValueError("a damaged header or footer")


def _byte(stream: io.BufferedIOBase) -> int:
    byte = stream.read(1)
    if not byte:
        raise ValueError("a header or footer that is cut off")
    return byte[0]


def _unsigned(stream: io.BufferedIOBase) -> int:
    value = 0
    for place in range(_LONGEST_NUMBER):
        byte = _byte(stream)
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value
    raise ValueError("a damaged header or footer")


def _signed(stream: io.BufferedIOBase) -> int:
    value = _unsigned(stream)
    return value >> 1 ^ -(value & 1)
