"""Readers: documents in every format, and damage that costs only its own record."""

from __future__ import annotations

import bz2
import configparser
import dataclasses
import gzip
import io
import json
import lzma
import os
import random
import re
import sys
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.data.corpora import compression, json_array, readers
from glm_jax.data.corpora.json_array import Elements
from glm_jax.data.corpora.readers import lines_before, normaliser, ranges, read
from glm_jax.data.corpora.records import Damaged
from glm_jax.errors import UserError

GZIP = gzip.compress(b"a", mtime=0)  # without a time stamp, which would change the names of the tests


def split(records: list[str | Damaged]) -> tuple[list[str], list[tuple[str, int]]]:
    """Return the good documents, and reason and line of the damaged ones."""
    good = [record for record in records if isinstance(record, str)]
    return good, [(record.reason, record.line) for record in records if isinstance(record, Damaged)]


# Formats


def test_text_documents_end_at_blank_lines(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n  one\r\n\ttwo\n \t\n\n\xe5\xa4\xa9\nlast\xe2\x80\xa8line")
    assert list(read(path, "text")) == ["  one\n\ttwo", "天\nlast\u2028line"]


@pytest.mark.parametrize("form", ["jsonl", "jsonl.zst", "json"])
def test_json_in_three_forms(tmp_path: Path, form: str):
    texts = ["one\n\nstill one", "天下\r\u2028", "[MASK]", '"}], {\\', "\ufffd"]
    lines = [json.dumps({"body": text, "n": [1, {"body": "no"}]}) for text in [*texts, " \n"]]
    path = tmp_path / "file"
    if form == "json":
        path.write_text("[\n" + ",\n".join(lines) + "\n]\n")
    elif form == "jsonl":
        path.write_text("\n\n".join(lines) + "\n")
    else:
        whole = ("\n\n".join(lines) + "\n").encode()
        path.write_bytes(zstandard.compress(whole[:40]) + zstandard.compress(whole[40:]))  # two frames
    assert list(read(path, form, "body")) == texts


def test_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    table = {"body": ["one", "天下", "", None], "n": [1, 2, 3, 4], "meta": [{"title": f"t{row}"} for row in range(4)]}
    pyarrow.parquet.write_table(pyarrow.table(table), path)
    assert split(list(read(path, "parquet", "body"))) == (["one", "天下"], [("null", 4)])
    assert list(read(path, "parquet", "meta.title")) == ["t0", "t1", "t2", "t3"]
    assert list(read(path, "parquet", "meta.title, body")) == ["t0\none", "t1\n天下", "t2", "t3"]
    with pytest.raises(UserError, match="no column 'text': set the source's `field` to one of body, n, meta"):
        list(read(path, "parquet", "text"))
    with pytest.raises(UserError, match="column 'n' holds int64 and no text: set the source's `field` to one of body"):
        list(read(path, "parquet", "n"))


def test_fields_are_joined_and_nested(tmp_path: Path):
    path = tmp_path / "a.jsonl"
    record = {"title": "刘备", "content": "话说", "meta": {"en": {"text": "deep"}}, "meta.en": "flat"}
    path.write_text(json.dumps(record) + "\n" + json.dumps({"title": "no content"}) + "\n")
    assert split(list(read(path, "jsonl", "title, content"))) == (["刘备\n话说", "no content"], [])
    assert split(list(read(path, "jsonl", "meta.en.text")))[0] == ["deep"]
    assert split(list(read(path, "jsonl", "meta.en")))[0] == ["flat"]


def test_normalisation():
    text = "e\u0301 ﬁ Ａ\r\nb\rc"
    assert normaliser("")(text) == text
    assert normaliser("nfc")(text) == "é ﬁ Ａ\r\nb\rc"
    assert normaliser("nfkc, newlines")(text) == "é fi A\nb\nc"


@pytest.mark.parametrize(
    ("form", "module", "extra"), [("jsonl.zst", "zstandard", "corpora"), ("parquet", "pyarrow", "parquet")]
)
def test_a_missing_package_is_named_with_the_extra_for_it_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, module: str, extra: str
):
    for name in [name for name in sys.modules if name.split(".")[0] == module] or [module]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "file"
    path.write_bytes(b"something")
    with pytest.raises(UserError) as caught:
        list(read(path, form))
    named = form.removeprefix("jsonl.").replace("zst", "zstd")
    assert str(caught.value) == f"reading {named} needs the package {module}: pip install -e '.[{extra}]'"
    extras = configparser.RawConfigParser()
    extras.read(Path(__file__).parents[2] / "setup.cfg")
    assert [re.split("[<>=]", line)[0] for line in extras["options.extras_require"][extra].split()] == [module]
    assert f"%({extra})s" in extras["options.extras_require"]["test"].split()


# Damage


@pytest.mark.parametrize(
    ("form", "content", "reason", "line", "message"),
    [
        ("text", b"good\n\nbad \xff\n", "invalid UTF-8", 3, "(byte 0xff at 4): convert"),
        ("text", b"good\n\nfirst\nb\0ad\n", "NUL", 4, "a NUL byte at 1"),
        ("jsonl", b'{"text": "good"}\n\n{"text": \n', "broken JSON", 3, "(Expecting value)"),
        ("jsonl", b'{"text": "good"}\n' + b"[" * 100_000, "broken JSON", 2, "broken JSON"),
        ("jsonl", b'{"text": "good"}\n{"body": "b"}\n', "missing field", 2, "no text in field 'text'"),
        ("jsonl", b'{"text": "good"}\n{"text": 1}\n', "not text", 2, "no text in field 'text' but a number"),
        ("jsonl", b'{"text": "good"}\n["text"]\n', "missing field", 2, "not a JSON object"),
        ("jsonl", b'{"text": "good"}\n{"text": "\\ud800"}\n', "invalid UTF-8", 2, "half a surrogate pair"),
        ("jsonl", b'{"text": "good"}\n{"text": "\\u0000"}\n', "NUL", 2, "a NUL character"),
        ("jsonl", b'{"text": "good"}\n{"text": "\xe5\xa4"}\n', "invalid UTF-8", 2, "convert the file"),
        ("json", b'[{"text": "good"}, {"text":', "broken JSON", 1, "broken JSON"),
        ("json", b'[{"text": "good"},\n {"text": "\xff"}]', "invalid UTF-8", 2, "convert the file"),
        ("jsonl.zst", zstandard.compress(b'{"text": "good"}\n') + b"(\xb5/", "truncated", 2, "ends too early"),
        ("jsonl.zst", zstandard.compress(b'{"text": "good"}\n') + GZIP, "unreadable", 2, "not a whole"),
    ],
)
def test_damage(tmp_path: Path, form: str, content: bytes, reason: str, line: int, message: str):
    path = tmp_path / "file"
    path.write_bytes(content)
    records = list(read(path, form))
    assert split(records)[0] == ["good"]
    damage = records[1]
    assert isinstance(damage, Damaged) and (damage.reason, damage.line) == (reason, line)
    assert message in damage.message and "\n" not in damage.message


@pytest.mark.parametrize("form", ["text", "jsonl", "jsonl.zst", "json", "parquet"])
def test_an_empty_file(tmp_path: Path, form: str):
    (tmp_path / "file").touch()
    assert split(list(read(tmp_path / "file", form))) == ([], [("empty file", 1)])


def test_files_of_another_format(tmp_path: Path):
    path = tmp_path / "file"
    path.write_text("text,n\na,1\n")
    assert split(list(read(path, "parquet"))) == ([], [("another kind of file", 1)])
    assert split(list(read(path, "json"))) == ([], [("another kind of file", 1)])
    assert split(list(read(path, "jsonl.zst"))) == ([], [("unreadable", 1)])


def test_a_truncated_zst_gives_everything_before_its_end(tmp_path: Path):
    draw = random.Random(0)
    lines = [json.dumps({"text": f"{number} {draw.random()}"}) + "\n" for number in range(20_000)]
    packed = zstandard.compress("".join(lines).encode())
    path = tmp_path / "file"
    path.write_bytes(packed[: len(packed) // 2])
    good, damaged = split(list(read(path, "jsonl.zst")))
    assert len(good) > 5000
    assert good == [json.loads(line)["text"] for line in lines[: len(good)]]
    assert damaged == [("truncated", len(good) + 1)]


def test_a_truncated_or_damaged_parquet(tmp_path: Path):
    path = tmp_path / "file"
    texts = [f"{number} " * 40 for number in range(3000)]
    pyarrow.parquet.write_table(pyarrow.table({"text": texts}), path, row_group_size=1000, use_dictionary=False)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    assert split(list(read(path, "parquet"))) == ([], [("unreadable", 1)])
    middle = len(whole) // 2
    path.write_bytes(whole[: middle - 300] + bytes(600) + whole[middle + 300 :])
    good, damaged = split(list(read(path, "parquet")))
    assert good == texts[:1000] + texts[2000:] and damaged == [("unreadable", 1001)]
    column = pyarrow.array([b"good", b"\xff", b"fine"]).view(pyarrow.string())
    pyarrow.parquet.write_table(pyarrow.table({"text": column}), path)
    assert split(list(read(path, "parquet"))) == (["good", "fine"], [("invalid UTF-8", 2)])


@pytest.mark.slow
@pytest.mark.parametrize("form", ["text", "jsonl", "jsonl.zst", "json"])
def test_a_record_too_long_is_skipped_in_little_memory(tmp_path: Path, form: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 1_000_000)
    long = b"x" * 20_000_000
    path = tmp_path / "file"
    if form == "text":
        path.write_bytes(b"good\n\n" + long + b"\nmore of it\n\nfine\n\n" + b"a line\n" * 200_000 + b"\nlast\n")
    else:
        lines = [json.dumps({"text": text}).encode() for text in ("good", "fine")]
        lines.insert(1, b'{"text": "' + long + b'"}')
        content = b"[\n" + b",\n".join(lines) + b"\n]" if form == "json" else b"\n".join(lines) + b"\n"
        path.write_bytes(zstandard.compress(content) if form == "jsonl.zst" else content)
    tracemalloc.start()
    good, damaged = split(list(read(path, form)))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    if form == "text":
        assert good == ["good", "fine", "last"]
        assert damaged[0] == ("too long", 3) and [reason for reason, _ in damaged] == ["too long"] * 2
    else:
        assert good == ["good", "fine"] and damaged == [("too long", 3 if form == "json" else 2)]
    assert peak < (20_000_000 if form == "text" else 10_000_000) or form == "jsonl.zst"


# Ranges


@pytest.mark.parametrize("form", ["text", "jsonl"])
@given(
    lines=st.lists(st.sampled_from([b"", b" \t", b'{"text": "a"}', b'{"text": "b"}\r', b"\xff", b"x" * 40, b"{"])),
    size=st.integers(1, 60),
    last=st.sampled_from([b"", b"\n"]),
)
def test_a_file_may_be_read_in_ranges(tmp_path_factory, form: str, lines: list[bytes], size: int, last: bytes):
    path = tmp_path_factory.getbasetemp() / "ranges"
    path.write_bytes(b"\n".join(lines) + last)
    parts = ranges(path, form, size)
    assert parts[0][0] == 0 and parts[-1][1] == path.stat().st_size
    assert [start for start, _ in parts[1:]] == [stop for _, stop in parts[:-1]]
    found = []
    for part in parts:
        for record in read(path, form, part=part):
            if isinstance(record, Damaged):
                record = dataclasses.replace(record, line=record.line + lines_before(path, part[0]))
            found.append(record)
    assert found == list(read(path, form))


def test_files_without_lines_are_one_range(tmp_path: Path):
    (tmp_path / "file").write_bytes(b"[1,\n2,\n3]\n" * 10)
    assert ranges(tmp_path / "file", "json", 10) == [(0, 100)]
    assert len(ranges(tmp_path / "file", "jsonl", 10)) == 10
    (tmp_path / "empty").touch()
    assert ranges(tmp_path / "empty", "jsonl", 10) == [(0, 0)]


# JSON arrays

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def elements(content: bytes, limit: int = 1 << 20) -> tuple[list[tuple[int, bytes | None]], bool]:
    found = Elements(io.BytesIO(content), limit)
    return list(found), found.closed


@given(
    values=st.lists(VALUES, max_size=6),
    chunk=st.integers(1, 40),
    indent=st.sampled_from([None, 0, 2]),
    ascii_only=st.booleans(),
)
def test_elements_are_those_that_json_sees(values: list[Any], chunk: int, indent: int | None, ascii_only: bool):
    content = json.dumps(values, indent=indent, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(json_array, "CHUNK", chunk)
        found, closed = elements(content)
    assert closed
    assert [json.loads((element or b"").decode("utf-8", "surrogatepass")) for _, element in found] == values
    lines = content.split(b"\n")
    for line, element in found:
        assert (element or b"").split(b"\n")[0] in lines[line - 1]


@pytest.mark.parametrize(
    "broken",
    [
        '{"text": tru}',
        '{"text": "no end',
        '{"text": "no bracket",\n "n": 1',
        '{"text": {"a": 1}',
        '{"text": "a"}}',
        '{"text": "a", "b": [1, 2}',
        '{"text" "a"}',
        "{]",
    ],
)
def test_a_broken_element_costs_itself_alone(tmp_path: Path, broken: str):
    good = ['{"text": "one"}', '{"text": "two"}', '{"text": "three"}']
    path = tmp_path / "file"
    path.write_text("[\n" + ",\n".join([good[0], broken, *good[1:]]) + "\n]")
    texts, damaged = split(list(read(path, "json")))
    assert texts == ["one", "two", "three"]
    assert damaged == [("broken JSON", 3)]


def test_an_array_without_its_end():
    assert elements(b'[{"a": 1},\n{"b": 2}') == ([(1, b'{"a": 1}'), (2, b'{"b": 2}')], False)
    assert elements(b"[]") == ([], True)
    assert elements(b"[1, 2]\n[3]") == ([(1, b"1"), (1, b"2")], True)
    assert elements(b'[1,"' + b"x" * 50 + b'", 2]', limit=20) == ([(1, b"1"), (1, None), (1, b"2")], True)


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
    with pytest.raises(
        UserError, match=r"column 'many' holds list.* and no text: set the source's `field` to one of raw"
    ):
        list(read(path, "parquet", "many"))


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
    ("form", "content", "reason"),
    [
        ("json", lambda: b"[" * 20_000_000, "too deep"),
        ("json", lambda: b"[" + b"[" * 900 + b"}" * 40_000 + b"]" * 901, "broken JSON"),
        ("jsonl", lambda: b'{"text": [' + b"[]," * 5_000_000 + b"0]}", "too long"),
        ("text", lambda: zstandard.compress(bytes(1 << 25) + b"\n"), "NUL"),
    ],
)
def test_hostile_files_take_little_time_and_memory(tmp_path: Path, form: str, content: Any, reason: str):
    path = tmp_path / "file"
    path.write_bytes(content())
    started = time.monotonic()
    tracemalloc.start()
    damaged = split(list(read(path, form)))[1]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert [found for found, _ in damaged] == [reason]
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


def test_pipes_and_devices_are_not_read(tmp_path: Path):
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", Path("/dev/zero")):
        with pytest.raises(UserError, match=r"cannot read .*: Not a regular file"):
            list(read(path, "text"))
