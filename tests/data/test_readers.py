"""Readers: documents in every format, and damage that costs only its own record."""

from __future__ import annotations

import configparser
import dataclasses
import gzip
import io
import json
import random
import re
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.data.corpora import json_array, readers
from glm_jax.data.corpora.json_array import Elements
from glm_jax.data.corpora.readers import lines_before, normaliser, ranges, read
from glm_jax.data.corpora.records import Damaged
from glm_jax.errors import UserError

GZIP = gzip.compress(b"a")


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
    lacking = Damaged("missing field", 1, "no column 'text': set the source's `field` to one of body, n, meta")
    assert list(read(path, "parquet", "body, text")) == [lacking]
    other = "column 'n' holds int64 and no text: set the source's `field` to one of body, meta"
    assert list(read(path, "parquet", "n")) == [Damaged("not text", 1, other)]


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
        ("jsonl", b'{"text": "good"}\n' + b"[" * 100_000, "too deep", 2, "too many brackets"),
        ("json", b'[{"text": "good"},\n' + b"[" * 100_000 + b"]" * 100_001, "too deep", 2, "too many brackets"),
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
