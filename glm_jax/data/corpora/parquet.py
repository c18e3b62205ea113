"""Read the rows of parquet files."""

from __future__ import annotations

import io
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from glm_jax.data.corpora import kinds
from glm_jax.data.corpora.records import Damaged, Located, import_package
from glm_jax.errors import UserError

MAGIC = b"PAR1"
MOST_ROWS = 1024  # held at a time,
BATCH_BYTES = 16_000_000  # or fewer where rows are large


def read(file: Path, stream: io.BufferedReader, head: bytes, fields: Sequence[str]) -> Iterator[Located | Damaged]:
    """Yield the rows of a parquet file, and damage; see readers.read_records.

    Args:
        file: its name, for messages.
        head: its first bytes.
        fields: names of columns, or of fields inside them after a dot. Empty means all columns.

    Raises:
        UserError: pyarrow is missing, or a column is missing or of a type that is no text.
    """
    parquet = import_package("parquet", "pyarrow.parquet")
    if not head.startswith(MAGIC):
        yield Damaged("another kind of file", 1, kinds.describe(head))
        return
    try:
        table = parquet.ParquetFile(stream)
    except (ValueError, OSError) as error:  # ValueError: pyarrow.ArrowInvalid
        yield Damaged("unreadable", 1, f"not a whole parquet file ({str(error).splitlines()[0]}): fetch it again")
        return
    columns = [_column(file, table.schema_arrow, field) for field in fields] or None
    before = 0
    for group in range(table.num_row_groups):
        number, about = before, table.metadata.row_group(group)
        rows = BATCH_BYTES * about.num_rows // max(1, about.total_byte_size)
        try:
            batches = table.iter_batches(min(max(1, rows), MOST_ROWS), row_groups=[group], columns=columns)
            for batch in batches:
                for row in range(batch.num_rows):
                    number += 1
                    yield _row(number, batch, row)
        except (ValueError, OSError) as error:
            yield Damaged(
                "unreadable", number + 1, f"damaged rows ({str(error).splitlines()[0]}): fetch the file again"
            )
        before += about.num_rows


def _column(file: Path, schema: Any, field: str) -> str:  # a pyarrow.Schema: pyarrow has no types
    """Return the column that a field is, or is in."""
    names = schema.names
    column = field if field in names else field.partition(".")[0]
    if column not in names:
        raise UserError(f"{file} has no column {field!r}: set the source's `field` to one of {', '.join(names)}")
    kinds_of_columns = {name: str(schema.field(name).type) for name in names}
    if column == field and not _may_hold_text(kinds_of_columns[column]):
        others = [name for name, kind in kinds_of_columns.items() if _may_hold_text(kind)]
        advice = f"set the source's `field` to one of {', '.join(others)}" if others else "no column does"
        raise UserError(f"{file}: column {field!r} holds {kinds_of_columns[column]} and no text: {advice}")
    return column


def _may_hold_text(kind: str) -> bool:
    """Whether values of a type, as pyarrow names it, may be text."""
    kind = kind.removeprefix("dictionary<values=")
    return kind.startswith(("string", "large_string", "binary", "large_binary", "null", "struct"))


def _row(number: int, batch: Any, row: int) -> Located | Damaged:  # a pyarrow.RecordBatch
    try:
        return number, {name: batch.column(name)[row].as_py() for name in batch.schema.names}
    except UnicodeDecodeError:
        return Damaged("invalid UTF-8", number, "invalid UTF-8: convert the column to UTF-8")
