"""Prompts in files, and their results in lines: plain text, text behind an id, or JSON."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from glm_jax.errors import UserError, printable
from glm_jax.storage.files import json_line

if TYPE_CHECKING:
    from glm_jax.inference.pending import Filled

STDIN = "standard input"


class Entry(NamedTuple):
    """A prompt."""

    text: str
    place: str = ""  # where it stands, for messages
    line: int | None = None
    id: str | int | None = None


class Entries(NamedTuple):
    """The prompts of a file."""

    entries: list[Entry]
    is_json: bool = False
    blank: int = 0  # lines without a prompt


def read(path: str) -> Entries:
    """Read the prompts of a file, or of standard input if `path` is "-".

    A line is a prompt, or an id, a tab and a prompt. If the name ends in .jsonl, or the first character is "{", a line
    is an object with `prompt` (or `text`) and perhaps `id`.

    Raises:
        UserError: it cannot be read, holds no prompt, or a line is not as it should be; the message names the line.
    """
    name, content = (STDIN, _standard_input()) if path == "-" else (path, _content(path))
    lines = content.removeprefix(b"\xef\xbb\xbf").split(b"\n")
    is_json = path.endswith(".jsonl") or content.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"{")
    parse = _parse_json if is_json else _parse_text
    entries = [parse(text, f"{name} line {number}", number) for number, text in _decoded(lines, name)]
    if not entries:
        raise UserError(f"{name} holds no prompt: write one a line")
    blank = len(lines) - (not lines[-1]) - len(entries)  # nothing follows the last line's end
    return Entries(entries, is_json, blank)


def _content(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise UserError(
            f"--input {path} cannot be read ({error.strerror}): name a file with one prompt a line"
        ) from error


def _standard_input() -> bytes:
    if sys.stdin is None:  # pyright: ignore[reportUnnecessaryComparison] (Python's None for a closed descriptor)
        raise UserError(f"{STDIN} is closed: give --prompt TEXT or --input FILE")
    try:
        return sys.stdin.buffer.read()
    except OSError as error:
        raise UserError(f"{STDIN} cannot be read ({error.strerror or error}): give --prompt or --input") from error


def _decoded(lines: list[bytes], name: str) -> Iterator[tuple[int, str]]:
    """Yield the lines that are not blank, with their numbers."""
    for number, line in enumerate(lines, 1):
        try:
            text = line.removesuffix(b"\r").decode("utf-8")
        except UnicodeDecodeError:
            raise UserError(f"{name} line {number} is not valid UTF-8: save it in UTF-8") from None
        if text.strip():
            yield number, text


def _parse_text(text: str, place: str, line: int) -> Entry:
    name, tab, rest = text.partition("\t")
    if not tab:
        return Entry(text, place, line)
    if not name:
        raise UserError(f"{place} begins with a tab: put an id before it, or remove it")
    return Entry(rest, place, line, name)


def _parse_json(text: str, place: str, line: int) -> Entry:
    try:
        value = json.loads(text)
    except RecursionError:
        raise UserError(f"{place} is nested too deeply: write an object with a prompt") from None
    except ValueError as error:
        raise UserError(f"{place} is not valid JSON ({error}): write one object a line") from None
    if not isinstance(value, dict):
        raise UserError(f'{place} is no object: write {{"prompt": "..."}}')
    key = "prompt" if "prompt" in value else "text"
    if key not in value:
        raise UserError(f"{place} has neither prompt nor text: add one of them")
    prompt, name = value[key], value.get("id")
    if not isinstance(prompt, str):
        raise UserError(f"{place}: {key} is no text: put it in quotes")
    if name is not None and (isinstance(name, bool) or not isinstance(name, str | int)):
        raise UserError(f"{place}: id is neither a text nor a whole number: write one of them")
    return Entry(prompt, place, line, name)


def as_json(entry: Entry, filled: Filled) -> str:
    """Return a result as a line of JSON, with the prompt's id or else its line."""
    name: dict[str, object] = {} if entry.line is None else {"line": entry.line}
    result: dict[str, object] = name if entry.id is None else {"id": entry.id}
    result |= {"text": filled.text, "fills": [fill._asdict() for fill in filled.fills]}
    if filled.alternatives:
        result["alternatives"] = [{"text": one.text, "score": one.score} for one in filled.alternatives]
    return json_line(result)


def as_text(entry: Entry, filled: Filled) -> str:
    """Return a result as a line of text; control characters and ends of lines in it are escaped, as in \\n."""
    name = "" if entry.id is None else f"{printable(str(entry.id))}\t"
    return f"{name}{printable(filled.text)}\n"
