"""Read the rows of parquet files."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator, Sequence
from typing import Any

from glm_jax.data.corpora import compression, kinds
from glm_jax.data.corpora.parquet_pages import Chunk, chunks, pages
from glm_jax.data.corpora.records import Damaged, Located, import_package
from glm_jax.types import Json

MAGIC = b"PAR1"
MOST_ROWS = 1024  # held at a time,
BATCH_BYTES = 16_000_000  # or fewer where rows may be large
BUFFER = 1 << 20  # bytes of a column that are read at a time
LARGEST_PAGE = 128_000_000  # bytes of a decompressed page, which pyarrow holds as a whole; or of a larger one,
PAGE_EXPANSION = 16  # bytes for each in the file: text takes a third


def read(stream: io.BufferedReader, head: bytes, fields: Sequence[str]) -> Iterator[Located | Damaged]:
    """Yield the rows of a parquet file, and damage; see readers.read_records.

    A file without a column, or in which it holds no text, is one Damaged.

    Args:
        head: the file's first bytes.
        fields: names of columns, or of fields inside them after a dot. Empty means all columns.

    Raises:
        UserError: pyarrow is missing.
    """
    parquet = import_package("parquet", "pyarrow.parquet")
    damages = (ValueError, OSError, import_package("parquet", "pyarrow").ArrowException)
    if not head.startswith(MAGIC):
        yield Damaged("another kind of file", 1, kinds.describe(head))
        return
    try:
        table = parquet.ParquetFile(stream, buffer_size=BUFFER, pre_buffer=False)  # not a group as a whole
        found = [_column(table.schema_arrow, field) for field in fields]
        groups = chunks(stream)
        if len(groups) != table.num_row_groups:
            raise ValueError("a damaged footer")
    except damages as error:
        yield Damaged("unreadable", 1, f"not a whole parquet file ({_said(error)}): fetch it again")
        return
    columns = [column for column in found if isinstance(column, str)]
    if len(columns) < len(found):
        yield next(column for column in found if isinstance(column, Damaged))
        return
    number, held, most = 0, 0, compression.FREE + compression.EXPANSION * os.fstat(stream.fileno()).st_size
    for group in range(table.num_row_groups):
        before, number = number, number + table.metadata.row_group(group).num_rows
        row = before
        try:
            size = _most_bytes(stream, table, groups[group], columns)
            if isinstance(size, str):
                yield Damaged("too long", before + 1, size)
                continue
            rows = min(max(1, BATCH_BYTES // size), MOST_ROWS)
            for batch in table.iter_batches(rows, row_groups=[group], columns=columns or None):
                for place in range(batch.num_rows):
                    row += 1
                    record = _row(row, batch, place)
                    yield record if isinstance(record, Damaged) else (row, record)
                    held += 0 if isinstance(record, Damaged) else _text_length(record)
                held += batch.nbytes  # values of other kinds; of text, a batch may hold once what many rows repeat
                if held > most:
                    said = f"it expands over {compression.EXPANSION}-fold here: no text does, leave it out"
                    yield Damaged("too long", row + 1, said)
                    return
        except damages as error:
            yield Damaged("unreadable", row + 1, f"damaged rows ({_said(error)}): fetch the file again")


def _said(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _most_bytes(stream: io.BufferedReader, table: Any, group: Sequence[Chunk], columns: Sequence[str]) -> int | str:
    """Return how many bytes a row of a group may take, by its page with the fewest values, or why it cannot be read.

    The sizes in a file's metadata are not used: they may be wrong, and the text of a dictionary counts once in them.
    """
    total = 1
    for index, chunk in enumerate(group[: len(table.schema)]):
        column = table.schema.column(index)
        if columns and not any(column.path == name or column.path.startswith(f"{name}.") for name in columns):
            continue
        repeats = column.max_repetition_level > 0  # a row may then hold all values of a page
        largest = 0
        for page in pages(stream, chunk.start, chunk.length):
            if page.size > max(LARGEST_PAGE, PAGE_EXPANSION * page.compressed):
                held = f"a page of {page.size / 1e6:,.0f} MB from {page.compressed / 1e6:,.1f} MB in the file"
                return f"{held}, more than is text: leave it out, or write the file again in smaller pages"
            largest = max(largest, page.size if repeats else -(-page.size // max(1, page.values)))
        total += largest
    return total


def _column(schema: Any, field: str) -> str | Damaged:  # a pyarrow.Schema: pyarrow has no types
    """Return the column that a field is, or is in."""
    names = schema.names
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        advice = f"set the source's `field` to one of {', '.join(names)}"
        return Damaged("missing field", 1, f"no column {field!r}: {advice}")
    kinds_of_columns = {name: str(schema.field(names.index(name)).type) for name in names}
    if column == field and not _may_hold_text(kinds_of_columns[column]):
        others = [name for name, kind in kinds_of_columns.items() if _may_hold_text(kind)]
        advice = f"set the source's `field` to one of {', '.join(others)}" if others else "no column does"
        return Damaged("not text", 1, f"column {field!r} holds {kinds_of_columns[column]} and no text: {advice}")
    return column


def _may_hold_text(kind: str) -> bool:
    """Whether values of a type, as pyarrow names it, may be text."""
    kind = kind.removeprefix("dictionary<values=")
    return kind.startswith(("string", "large_string", "binary", "large_binary", "null", "struct"))


def _text_length(record: Json) -> int:
    return sum(len(value) for value in record.values() if isinstance(value, str | bytes))


def _row(number: int, batch: Any, row: int) -> Json | Damaged:  # a pyarrow.RecordBatch
    try:
        return {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Damaged("invalid UTF-8", number, "invalid UTF-8: convert the column to UTF-8")
    except (ValueError, OverflowError) as error:  # for example, a date that Python does not know
        return Damaged("unreadable", number, f"a value that cannot be read ({_said(error)}): fix it or leave it out")
