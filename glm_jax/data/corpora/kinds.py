"""Recognise what a file is by its first bytes, so that one message names the cause and no line of it is misread."""

from __future__ import annotations

import json
import re

HEAD = 4096  # bytes that are looked at

COMPRESSED = {
    "gzip": re.compile(rb"\x1f\x8b\x08"),
    "bzip2": re.compile(rb"BZh[1-9](?:1AY&SY|\x17rE8P\x90)"),
    "xz": re.compile(rb"\xfd7zXZ\x00"),
    "zstd": re.compile(rb"\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18"),
}
_TO_UTF8 = "convert it to UTF-8, for example with iconv -f {} -t UTF-8"
_OTHERS = [
    (rb"\xff\xfe\0\0|\0\0\xfe\xff", "UTF-32 text", _TO_UTF8.format("UTF-32")),
    (rb"\xff\xfe|\xfe\xff", "UTF-16 text", _TO_UTF8.format("UTF-16")),
    (rb"(?:[\t\n\r -~]\0){8}", "UTF-16 text", _TO_UTF8.format("UTF-16LE")),
    (rb"(?:\0[\t\n\r -~]){8}", "UTF-16 text", _TO_UTF8.format("UTF-16BE")),
    (rb"PAR1\x15", "a parquet file", "set the source's `format` to parquet"),
    (rb"ARROW1\0|FEA1\0", "an Arrow file", "convert it to parquet"),
    (rb"PK\x03\x04", "a zip archive", "unpack it"),
    (rb"(?s:.{257})ustar", "a tar archive", "unpack it"),
    (rb"7z\xbc\xaf\x27\x1c", "a 7z archive", "unpack it"),
    (rb"\x04\x22\x4d\x18", "an lz4 file", "decompress it"),
    (rb"%PDF-", "a PDF file", "extract its text"),
    (rb"\x89HDF\r\n", "an HDF5 file", "convert it to parquet"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text"),
    (rb"Obj\x01", "an Avro file", "convert it to parquet"),
    (rb"version https://git-lfs\.github\.com/", "a Git LFS pointer and not the file", "run git lfs pull"),
]
_OTHER_KINDS = [(re.compile(magic), found, advice) for magic, found, advice in _OTHERS]
_KEY_OF_ARRAY = re.compile(r'"(\w+)"\s*:\s*\[')


def compression(head: bytes) -> str:
    """Return the name of the compression, a key of COMPRESSED, or ""."""
    return next((name for name, magic in COMPRESSED.items() if magic.match(head)), "")


def other_kind(head: bytes, form: str) -> str:
    """Say what a file is, and what to do, if its first bytes cannot be those of `form`; else return "".

    Args:
        head: the first HEAD bytes, decompressed.
        form: one of config.FORMATS, but parquet.
    """
    if name := compression(head):
        return f"a {name} file inside a compressed one: decompress it once"
    for magic, found, advice in _OTHER_KINDS:
        if magic.match(head):
            return f"{found}: {advice}"
    if form in ("json", "jsonl", "jsonl.zst"):
        return _other_json(head.removeprefix(b"\xef\xbb\xbf").lstrip().decode("utf-8", "replace"), form)
    return ""


def describe(head: bytes) -> str:
    """Say what a file that should be parquet is, and what to do."""
    if name := compression(head):
        return f"a {name} file: decompress it"
    for magic, found, advice in _OTHER_KINDS:
        if found != "a parquet file" and magic.match(head):
            return f"{found}: {advice}, or leave it out with a glob such as *.parquet"
    text = head[:40].decode("utf-8", "ignore").partition("\n")[0]
    begins = f" (it begins with {text!r})" if text.isprintable() and text.strip() else ""
    return f"not a parquet file{begins}: leave it out with a glob such as *.parquet, or give another `format`"


def _other_json(text: str, form: str) -> str:
    """Tell an array, an object and lines of objects from each other."""
    first, newline, rest = text.partition("\n")
    whole_line = _is_json(first)
    if form == "json":
        if not text or text.startswith("["):
            return ""
        if not text.startswith("{"):
            return "not a JSON array: give another `format`, such as text or lines"
        if whole_line and rest.lstrip().startswith("{"):
            return "one JSON object a line: set the source's `format` to jsonl"
        key = _KEY_OF_ARRAY.search(text)
        where = f".{key[1]}" if key else ".KEY"
        return f"one JSON object, not an array: take the array of records out of it, for example with jq {where}"
    if not newline or whole_line:
        return ""
    if re.match(r'\[\s*[{\["]', text):
        return "a JSON array, not an object a line: set the source's `format` to json"
    if re.match(r'\{\s*\n\s*"', text):
        return "JSON objects over several lines each: put each on its own line, for example with jq -c ."
    return ""


def _is_json(line: str) -> bool:
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
