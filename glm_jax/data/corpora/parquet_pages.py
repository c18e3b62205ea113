"""Read how large the pages of a parquet file are, before pyarrow makes room for them.

A page is decompressed as a whole, and its header alone says to how many bytes; pyarrow believes it and shows it to
nobody. A header is a struct in Thrift's compact protocol, of which this reads what occurs in one (parquet.thrift of
apache/parquet-format).
"""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from dataclasses import dataclass

_SIZE, _COMPRESSED, _DATA, _DATA_V2 = 2, 3, 5, 8  # fields of a header; the last two are structs
_VALUES = 1  # the field of these structs that counts values
_DEEPEST = 4  # structs inside each other
_LONGEST_BYTES = 1 << 31  # of text in a header; from Thrift's own limit on
_LONGEST_NUMBER = 10  # bytes of a variable-length integer

_Value = int | dict[int, "_Value"]


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
        raise ValueError("a damaged page header")
    return value


def _struct(stream: io.BufferedIOBase, depth: int) -> dict[int, _Value]:
    """Read a struct: its numbers and structs, by field."""
    fields: dict[int, _Value] = {}
    field = 0
    while byte := _byte(stream):
        delta, kind = byte >> 4, byte & 15
        field = field + delta if delta else _signed(stream)
        if kind in (1, 2):  # true, false
            fields[field] = kind == 1
        elif kind in (4, 5, 6):  # integers of 16, 32 and 64 bits
            fields[field] = _signed(stream)
        elif kind == 8:  # bytes
            stream.seek(min(_unsigned(stream), _LONGEST_BYTES), os.SEEK_CUR)
        elif kind == 12 and depth < _DEEPEST:
            fields[field] = _struct(stream, depth + 1)
        else:
            raise ValueError("a damaged page header")
    return fields


def _byte(stream: io.BufferedIOBase) -> int:
    byte = stream.read(1)
    if not byte:
        raise ValueError("a page header that is cut off")
    return byte[0]


def _unsigned(stream: io.BufferedIOBase) -> int:
    value = 0
    for place in range(_LONGEST_NUMBER):
        byte = _byte(stream)
        value |= (byte & 127) << 7 * place
        if byte < 128:
            return value
    raise ValueError("a damaged page header")


def _signed(stream: io.BufferedIOBase) -> int:
    value = _unsigned(stream)
    return value >> 1 ^ -(value & 1)
