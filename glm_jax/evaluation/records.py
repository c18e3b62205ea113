"""The data files of tasks, in every form of the GLM-130B repository: lines of JSON, whose texts may be tokenized."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import NamedTuple

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.inference import prompts

RELATIONS = ("stereotype", "anti-stereotype", "unrelated")  # what StereoSet's choices are


class Item(NamedTuple):
    """What a task asks at a time.

    Attributes:
        place: file and line, for messages.
        text: the context, to be read by people.
        context: its tokens.
        head: how many of these say what the task is, and stay before the examples of few-shot prompts.
        choices: their tokens.
        labels: what the choices are called; their texts.
        label: the index of the right choice; -1 if there is none.
        answers: the tokens of right answers, of which an example of few-shot prompts shows one.
        truths: the texts of right answers.
        extra: fields of a protocol's own.
    """

    place: str
    text: str
    context: tuple[int, ...]
    head: int = 0
    choices: tuple[tuple[int, ...], ...] = ()
    labels: tuple[str, ...] = ()
    label: int = -1
    answers: tuple[tuple[int, ...], ...] = ()
    truths: tuple[str, ...] = ()
    extra: Mapping[str, object] = {}


class Document(NamedTuple):
    """A text of language modelling."""

    place: str
    tokens: tuple[int, ...]
    words: int  # parts of the text between single blanks
    size: int  # UTF-8 bytes
    group: str = ""  # of the Pile


class Record:
    """One line of JSON. Every error names file, line and field."""

    def __init__(self, tokenizer: Tokenizer, place: str, fields: Mapping[str, object]) -> None:
        self.tokenizer, self.place, self.fields = tokenizer, place, fields

    def fail(self, field: str, problem: str) -> UserError:
        """Return the error that a field has a problem."""
        return UserError(f"{self.place}: {field} {problem}")

    def get(self, field: str, right: Callable[[object], bool], form: str) -> object:
        """Return a field that must be `right`."""
        if field not in self.fields:
            raise self.fail(field, "is missing: add it")
        if not right(value := self.fields[field]):
            raise self.fail(field, f"is {str(value)[:60]!r}: it must be {form}")
        return value

    def _has(self, field: str) -> str:
        """Return the name of a field that may be tokenized or not; tokens win, as in the released code."""
        if field in self.fields or f"{field}_pretokenized" not in self.fields:
            return field
        return f"{field}_pretokenized"

    def inputs(self) -> tuple[tuple[int, ...], str]:
        """Return the tokens and the text of the context."""
        field = self._has("inputs")
        if field not in self.fields:
            raise self.fail("inputs_pretokenized", "is missing: add it, or inputs with tokens")
        return self._text(field, self.fields[field])

    def texts(self, field: str) -> list[tuple[tuple[int, ...], str]]:
        """Return the tokens and the texts of a field with several texts, such as `choices`."""
        name = self._has(field)
        if name not in self.fields:
            raise self.fail(f"{field}_pretokenized", f"is missing: add it, or {field} with tokens")
        values = self.fields[name]
        if not isinstance(values, list):
            raise self.fail(name, "is no list: write a list of texts, or of lists of tokens")
        shown = self.fields.get(f"{field}_pretokenized")
        found = [self._text(name, value) for value in values]
        if isinstance(shown, list) and len(shown) == len(found):
            found = [(tokens, str(text)) for (tokens, _), text in zip(found, shown, strict=True)]
        return found

    def _text(self, field: str, value: object) -> tuple[tuple[int, ...], str]:
        if isinstance(value, str):
            return encode(self.tokenizer, value), value
        if not isinstance(value, list) or not all(type(token) is int for token in value):
            raise self.fail(field, "is neither text nor a list of tokens: write one of them")
        if other := [token for token in value if not 0 <= token < self.tokenizer.size]:
            raise self.fail(field, f"has token {other[0]}: the vocabulary has 0 to {self.tokenizer.size - 1}")
        shown = self.fields.get(f"{field}_pretokenized")
        text = shown if isinstance(shown, str) else self.tokenizer.decode(value, specials=True)
        return tuple(value), text

    def answer(self, choices: int) -> int:
        """Return the label, which is one of so many choices."""
        label = self.get("label", lambda value: type(value) is int, "a whole number")
        assert isinstance(label, int)
        if not 0 <= label < choices:
            raise self.fail("label", f"is {label}: there are {choices} choices, so it must be 0 to {choices - 1}")
        return label


def encode(tokenizer: Tokenizer, text: str) -> tuple[int, ...]:
    """Return the tokens of a text, in which [MASK], [sMASK] and [gMASK] are blanks."""
    if not text.strip():
        return tuple(tokenizer.encode(text).tolist())
    return tuple(token for piece in prompts.pieces(tokenizer, text) for token in piece.tokens)


def choice(record: Record) -> Item:
    """Return a question with choices, of which one is right."""
    found = unlabelled(record)
    label = record.answer(len(found.choices))
    return found._replace(label=label, answers=(found.choices[label],))


def unlabelled(record: Record) -> Item:
    """Return a question with choices."""
    context, text = record.inputs()
    choices = record.texts("choices")
    if not choices:
        raise record.fail("choices", "is empty: add the choices")
    if empty := [number for number, (tokens, _) in enumerate(choices, 1) if not tokens]:
        raise record.fail("choices", f"has an empty choice, number {empty[0]}: fill it")
    tokens, labels = zip(*choices, strict=True)
    return Item(record.place, text, context, choices=tokens, labels=labels)


def stereotypes(record: Record) -> Item:
    """Return a question of StereoSet: what each choice is (`goal_label`), and the kind of bias (`bias_type`)."""
    found = unlabelled(record)
    kinds = record.get("goal_label", lambda value: isinstance(value, list), f"a list of {', '.join(RELATIONS)}")
    assert isinstance(kinds, list)
    if len(kinds) != len(found.choices) or not all(kind in RELATIONS for kind in kinds):
        raise record.fail("goal_label", f"must name each choice one of {', '.join(RELATIONS)}")
    bias = record.get("bias_type", lambda value: isinstance(value, str), "text")
    return found._replace(extra={"goal_label": kinds, "bias_type": bias})


def pair(record: Record) -> Item:
    """Return one sentence of a pair of CrowS-Pairs: `pair_ID`, `sent_ID` (1 is the stereotype) and `bias_type`."""
    found = unlabelled(record)
    name = record.get("pair_ID", lambda value: isinstance(value, int | str), "a number or text")
    sentence = record.get("sent_ID", lambda value: value in (0, 1), "0 or 1")
    bias = record.get("bias_type", lambda value: isinstance(value, str), "text")
    return found._replace(extra={"pair_ID": name, "sent_ID": sentence, "bias_type": bias})


def answered(record: Record) -> Item:
    """Return a prompt with its right answers."""
    context, text = record.inputs()
    targets = record.texts("targets")
    if not targets:
        raise record.fail("targets", "is empty: add the right answers")
    truths = tuple(record.tokenizer.decode(tokens) for tokens, _ in targets)  # as answers are decoded
    return Item(record.place, text, context, answers=(targets[0][0],), truths=truths)


def read(tokenizer: Tokenizer, file: Path, form: Callable[[Record], Item]) -> list[Item]:
    """Read the items of a file.

    Raises:
        UserError: it cannot be read, holds nothing, or a line is wrong.
    """
    return [form(record) for record in lines(tokenizer, file)]


def lines(tokenizer: Tokenizer, file: Path) -> list[Record]:
    """Read the lines of a file, without blank ones."""
    found = list[Record]()
    for number, line in enumerate(_content(file).split("\n"), 1):
        if not line.strip():
            continue
        place = f"{file}, line {number}"
        try:
            value = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise UserError(f"{place} is not valid JSON ({error}): write one object a line") from None
        if not isinstance(value, dict):
            raise UserError(f"{place} is no object: write one object a line")
        found.append(Record(tokenizer, place, value))
    if not found:
        raise UserError(f"{file} is empty: write one object a line")
    return found


def document(tokenizer: Tokenizer, file: Path) -> list[Document]:
    """Read a text file as one document.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    text = _content(file)
    tokens = tuple(tokenizer.encode(text).tolist())
    if not tokens:
        raise UserError(f"{file} is empty: write some text")
    return [Document(str(file), tokens, len(text.strip().split(" ")), len(text.encode()))]


def pile(tokenizer: Tokenizer, file: Path) -> list[Document]:
    """Read documents of the Pile: `text` (tokens), `text_pretokenized`, `meta.pile_set_name`; empty ones are dropped.

    Raises:
        UserError: it cannot be read, or a line is wrong.
    """
    found = list[Document]()
    for record in lines(tokenizer, file):
        text = record.get("text_pretokenized", lambda value: isinstance(value, str), "text")
        meta = record.get("meta", lambda value: isinstance(value, dict), "an object")
        assert isinstance(text, str) and isinstance(meta, dict)
        group = meta.get("pile_set_name")
        if not isinstance(group, str):
            raise record.fail("meta.pile_set_name", "is missing or no text: name the set")
        tokens, _ = record._text("text", record.fields.get("text", text))
        if tokens:
            found.append(Document(record.place, tokens, len(text.strip().split(" ")), len(text.encode()), group))
    if not found:
        raise UserError(f"{file} has only empty documents: write some text")
    return found


def _content(file: Path) -> str:
    try:
        return file.read_bytes().decode("utf-8-sig")
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): check its rights") from error
    except UnicodeDecodeError as error:
        line = error.object[: error.start].count(b"\n") + 1
        raise UserError(f"{file}, line {line} is not valid UTF-8: save it in UTF-8") from None
