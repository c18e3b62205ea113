"""What a file is, whatever its name says, and how much work a hostile one may make."""

from __future__ import annotations

import bz2
import gzip
import io
import json
import lzma
import os
import re
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from test_readers import split

from glm_jax.data.corpora import compression, parquet
from glm_jax.data.corpora.parquet_pages import Chunk, chunks, pages
from glm_jax.data.corpora.readers import ranges, read
from glm_jax.data.corpora.records import Damaged
from glm_jax.errors import UserError

GZIP = gzip.compress(b"a")


# What a file is

PACKERS = {"gzip": gzip.compress, "bzip2": bz2.compress, "xz": lzma.compress, "zstd": zstandard.compress}
CONTENTS = {
    "text": b"one\ntwo\n\nthree\n",
    "lines": b"one\ntwo\n\nthree\n",
    "jsonl": b'{"text": "one\\ntwo"}\n{"text": "three"}\n',
    "json": b'[{"text": "one\\ntwo"}, {"text": "three"}]',
}


@pytest.mark.parametrize("name", PACKERS)
@pytest.mark.parametrize("form", CONTENTS)
def test_compressed_files_are_read_as_their_content(tmp_path: Path, form: str, name: str):
    path = tmp_path / "file"
    content, pack = CONTENTS[form], PACKERS[name]
    expected = ["one", "two", "three"] if form == "lines" else ["one\ntwo", "three"]
    path.write_bytes(pack(content[:9]) + pack(content[9:]) + bytes(4 if name in ("gzip", "xz") else 0))
    assert list(read(path, form)) == expected
    assert ranges(path, form, 10) == [(0, path.stat().st_size)]
    path.write_bytes(pack(content)[:-3])
    good, damaged = split(list(read(path, form)))
    assert good == expected[: len(good)]
    assert [reason for reason, _ in damaged] == ["truncated"] or (form == "json" and good == expected)  # an array ends
    path.write_bytes(pack(pack(content)))
    assert split(list(read(path, form))) == ([], [("another kind of file", 1)])


SQUAD = b'{"version": "1", "data": [{"title": "a"},\n{"title": "b"}]}\n'


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("text", "\ufeffone\n\ntwo\n".encode("utf-16-le"), "UTF-16 text: convert it to UTF-8"),
        ("lines", "one, two, three\n".encode("utf-16-be"), "UTF-16 text: convert it to UTF-8"),
        ("jsonl", '{"text": "one"}\n'.encode("utf-16-le"), "UTF-16 text: convert it to UTF-8"),
        ("text", b"PAR1\x15\0", "a parquet file: set the source's `format` to parquet"),
        ("jsonl", b"ARROW1\0\0", "an Arrow file: convert it to parquet"),
        ("text", b"PK\x03\x04", "a zip archive: unpack it"),
        ("text", gzip.compress(bytes(257) + b"ustar"), "a tar archive: unpack it"),
        ("lines", b"version https://git-lfs.github.com/spec/v1\noid\n", "a Git LFS pointer and not the file"),
        (
            "json",
            SQUAD,
            "one JSON object, not an array: take the array of records out of it, for example with jq .",
        ),
        ("json", b'{"text": "a"}\n{"text": "b"}\n', "one JSON object a line: set the source's `format` to jsonl"),
        (
            "jsonl",
            b'[\n{"text": "a"},\n{"text": "b"}]\n',
            "a JSON array, not an object a line: set the",
        ),
        ("jsonl", b'{\n "data": [\n  {"title": "a"}]}\n', "JSON objects over several lines each"),
        ("parquet", b"ARROW1\0\0", "an Arrow file: convert it to parquet"),
        ("parquet", b"# A table\n", "not a parquet file (it begins with '# A table'): leave it out with a glob"),
        ("parquet", GZIP, "a gzip file: decompress it"),
    ],
)
def test_a_file_of_another_kind_is_one_damage_that_names_it(tmp_path: Path, form: str, content: bytes, message: str):
    path = tmp_path / "file"
    path.write_bytes(content * (1 if form == "json" else 5))
    found = [record for part in ranges(path, form, 10) for record in read(path, form, part=part)]
    assert len(found) == 1 and isinstance(found[0], Damaged) and found[0].reason == "another kind of file"
    assert message in found[0].message


def test_parquet_of_bytes_and_of_no_text(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = pyarrow.table({"raw": [b"caf\xc3\xa9", b"\xff"], "many": [["a"], ["b"]]})
    pyarrow.parquet.write_table(table, path)
    assert split(list(read(path, "parquet", "raw"))) == (["café"], [("invalid UTF-8", 2)])
    [damage] = read(path, "parquet", "many")
    assert isinstance(damage, Damaged) and damage.reason == "not text"
    assert re.search("column 'many' holds list.* and no text: set the source's `field` to one of raw$", damage.message)


@pytest.mark.parametrize(
    ("value", "reason", "message"),
    [
        (None, "null", "'text', which is null"),
        (1, "not text", "but a number"),
        (True, "not text", "but true or false"),
        (["a"], "not text", "but a list"),
        ({"a": "b"}, "not text", "but an object"),
    ],
)
def test_the_cause_of_a_record_without_text_is_named(tmp_path: Path, value: object, reason: str, message: str):
    path = tmp_path / "file"
    path.write_text(json.dumps({"text": value, "other": "good"}) + "\n")
    [damage] = read(path, "jsonl")
    assert isinstance(damage, Damaged) and damage.reason == reason and message in damage.message
    assert list(read(path, "jsonl", "text, other, missing")) == ["good"]


@pytest.mark.parametrize("blank", ["\n\u3000\n", "\n\xa0 \n", "\n\x85\n", "\r\r", "\r \t\r", "\r\n\r\n", "\x85\x85"])
def test_blank_lines_of_every_kind_end_a_document(tmp_path: Path, blank: str):
    path = tmp_path / "file"
    path.write_bytes(f"one{blank}two\rstill two{blank}three".encode())
    assert list(read(path, "text")) == ["one", "two\rstill two", "three"]
    found = [record for part in ranges(path, "text", 4) for record in read(path, "text", part=part)]
    assert found == ["one", "two\rstill two", "three"]


# Budgets


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "content", "reasons"),
    [
        ("json", lambda: b"[" + b"[" * 50_000 + b"]" * 50_001, ["too deep"]),
        ("json", lambda: b"[" * 50_000, ["too deep", "truncated"]),
        ("json", lambda: b"[" + b"[" * 900 + b"}" * 40_000 + b"]" * 901, ["broken JSON"]),
        ("jsonl", lambda: b'{"text": [' + b"[]," * 5_000_000 + b"0]}", ["too long"]),
        ("text", lambda: zstandard.compress(bytes(1 << 25) + b"\n"), ["NUL"]),
        ("text", lambda: b"a\n" * 100_000, []),
        ("text", lambda: b"a\r\r" * 100_000, []),
        ("text", lambda: b" \r\n" * 100_000, []),
        ("text", lambda: b"\r" * 20_000_000, []),
    ],
)
def test_hostile_files_take_little_time_and_memory(tmp_path: Path, form: str, content: Any, reasons: list[str]):
    path = tmp_path / "file"
    path.write_bytes(content())
    started = time.monotonic()
    tracemalloc.start()
    damaged = split(list(read(path, form)))[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [found for found, _ in damaged] == reasons
    assert peak < 150_000_000 and time.monotonic() - started < 20


def test_what_expands_without_end_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compression, "FREE", 1 << 20)
    path = tmp_path / "file"
    path.write_bytes(zstandard.compress(b"a" * (1 << 25)))
    assert split(list(read(path, "text"))) == ([], [("too long", 1)])
    parameters = zstandard.ZstdCompressionParameters(window_log=28)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    path.write_bytes(packer.compress(b"a") + packer.flush())
    [damage] = read(path, "text")
    assert isinstance(damage, Damaged) and "zstd needs over 128 MiB of memory" in damage.message


def one_text(size: int, rows: int) -> pyarrow.Table:
    """Return rows of the same text, which a parquet file then holds once."""
    text = pyarrow.array(["b" * size]).dictionary_encode()
    return pyarrow.table({"text": text.take(pyarrow.array([0] * rows))})


@pytest.mark.parametrize(
    ("table", "options", "texts", "reasons"),
    [
        # the mean row is small
        (pyarrow.table({"text": ["a"] * 3000 + ["b" * 2_000_000] * 40}), {"write_batch_size": 1}, 3040, []),
        (one_text(2_000_000, 40), {}, 40, []),
        (one_text(2_000_000, 400), {}, 224, ["too long"]),  # more text than a small file may hold
        (pyarrow.table({"text": ["a" * 900_000] * 20}), {"use_dictionary": False}, 0, ["too long"]),  # one page
    ],
)
def test_parquet_that_expands_takes_little_memory(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    table: pyarrow.Table,
    options: dict[str, Any],
    texts: int,
    reasons: list[str],
):
    monkeypatch.setattr(compression, "FREE", 500_000_000)
    monkeypatch.setattr(parquet, "LARGEST_PAGE", 10_000_000)
    path = tmp_path / "file"
    pyarrow.parquet.write_table(table, path, compression="zstd", data_page_size=1 << 20, **options)
    pool, peak, good, damaged = pyarrow.default_memory_pool(), 0, 0, []
    before = pool.bytes_allocated()  # by the tables
    for record in read(path, "parquet"):
        peak = max(peak, pool.bytes_allocated() - before)
        if isinstance(record, Damaged):
            damaged.append(record.reason)
        else:
            good += 1
    assert damaged == reasons and abs(good - texts) < 8
    assert peak < 60_000_000


@pytest.mark.parametrize(
    "options", [{}, {"use_dictionary": False, "data_page_version": "2.0"}, {"compression": "none"}]
)
def test_pages_are_what_the_metadata_sums(options: dict[str, Any]):
    texts = [f"text {number} " * 40 for number in range(5000)]
    table = pyarrow.table({"text": texts, "many": [[{"a": number}] * 3 for number in range(5000)]})
    file = io.BytesIO()
    pyarrow.parquet.write_table(table, file, data_page_size=1 << 16, **options)
    group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
    (ours,) = chunks(file)
    for chunk, our in zip(map(group.column, range(group.num_columns)), ours, strict=True):
        starts = [place for place in (chunk.dictionary_page_offset, chunk.data_page_offset) if place]
        assert our == Chunk(min(starts), chunk.total_compressed_size)
        found = list(pages(file, our.start, our.length))
        assert sum(page.values for page in found) == chunk.num_values + (len(starts) == 2)
        headers = chunk.total_uncompressed_size - sum(page.size for page in found)
        assert 0 < headers < 2000 * len(found)  # which hold a text or two
        assert chunk.total_compressed_size == sum(page.compressed for page in found) + headers


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (b"", "a header or footer that is cut off"),
        (b"\x00", "a damaged header or footer"),  # an empty struct
        (b"\x15\x00\x15", "a header or footer that is cut off"),
        (b"\x15\x00\x15" + b"\xff" * 20, "a damaged header or footer"),  # a number of too many bytes
        (b"\x18\xff\xff\xff\xff\xff\xff\xff\x7f", "a header or footer that is cut off"),  # a text without end
        (b"\x1c" * 50, "a damaged header or footer"),  # structs inside each other
        (b"\x1b\x15", "a damaged header or footer"),  # a map, which occurs in neither
        (b"\x19" * 50, "a damaged header or footer"),  # lists inside each other
        (b"\x15\x00\x15\x02\x15\xfe\xff\xff\xff\x0f\x00", "a page larger than the file"),
    ],
)
def test_a_damaged_page_header(header: bytes, message: str):
    with pytest.raises(ValueError, match=f"^{message}$"):
        list(pages(io.BytesIO(header), 0, 1000))


def test_pipes_and_devices_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot read .*: Not a regular file"):
            list(read(path, "text"))


def test_a_list_of_doubles_in_a_page_header_does_not_outrun_the_file():
    """Field 1 is a list of 2^31 - 1 doubles in the compact protocol of Thrift; the file ends after its length."""
    header = bytes([0x19, 0xF7, 0xFF, 0xFF, 0xFF, 0xFF, 0x07])
    start = time.process_time()
    with pytest.raises(ValueError, match="cut off"):
        list(pages(io.BytesIO(header), 0, len(header)))
    assert time.process_time() - start < 5


def test_long_bytes_in_a_page_header_are_not_read_into_memory(tmp_path: Path):
    """Field 1 has 2^30 bytes, which a sparse file holds; the struct ends after them, without a page's sizes."""
    file = tmp_path / "sparse"
    file.write_bytes(bytes([0x18, 0x80, 0x80, 0x80, 0x80, 0x04]))
    os.truncate(file, 2**30 + 100)
    tracemalloc.start()
    with file.open("rb") as stream, pytest.raises(ValueError, match="damaged"):
        list(pages(stream, 0, 100))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 10_000_000
