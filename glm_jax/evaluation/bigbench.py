"""Tasks of BIG-bench (arXiv 2206.04615), whose file is a task.json: its examples are choices or answers, zero-shot."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation import records
from glm_jax.evaluation.records import Item
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.work import Choices, Columns, Generated, Result, Work
from glm_jax.inference.batch import Decoder

# what a task.json says, and its value where it does not
DEFAULTS = {"task_prefix": "", "example_input_prefix": "\nQ: ", "example_output_prefix": "\nA: ",
            "choice_prefix": "\n  choice: "}  # fmt: skip
GRADE, EXACT = "multiple_choice_grade", "exact_str_match"


class Graded(Choices):
    """Examples with `target_scores`: what each choice is worth.

    The measure is the worth of the likeliest choices, 0 being that of choices by chance and 100 that of the best.
    """

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the worth of each likeliest choice, and that of the mean and of the best choice."""
        found = list[tuple[float, float, float]]()
        for item, scores in zip(self._items, self.scores(results), strict=True):
            worth: Sequence[float] = item.extra["worth"]  # pyright: ignore[reportAssignmentType] (from `_read`)
            found.append((worth[int(np.argmax(scores))], sum(worth) / len(worth), max(worth)))
        return {"BIG-bench": np.array(found)}


class Matched(Generated):
    """Examples with a `target`: the answer is right if it is one of these texts.

    Attributes:
        stop: what ends an answer (`stop_string`); empty for nothing.
        pattern: what is searched for in it (`output_regex`); None takes all of it.
    """

    stop: str = ""
    pattern: re.Pattern[str] | None = None

    def answer(self, beams: Sequence[Sequence[int]]) -> str:
        """Return the part of the answer that counts."""
        text = super().answer(beams)
        text = text.split(self.stop)[0] if self.stop else text
        found = self.pattern.search(text) if self.pattern else None
        return found.group() if found else text

    def judge(self, answer: str, truths: Sequence[str]) -> dict[str, float]:
        """Return 1 for one of the very texts."""
        return {"Accuracy": float(any(answer.strip() == truth.strip() for truth in truths))}

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the worth of each answer, between that of none and of all."""
        (right,) = super().columns(results).values()
        return {"BIG-bench": np.hstack([right, np.zeros_like(right), np.ones_like(right)])}


def open_task(decoder: Decoder, tokenizer: Tokenizer, task: Task, file: Path) -> Work:
    """Read a task.json.

    Raises:
        UserError: it cannot be read, or an example is wrong or has no room in the model's rows.
    """
    said = _said(file)
    examples: object = said.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{file}: examples is missing or empty: it must be a list of objects")
    graded = isinstance(examples[0], dict) and "target_scores" in examples[0]

    def read(tokenizer: Tokenizer, file: Path, form: Callable[[records.Record], Item]) -> list[Item]:
        del form
        make = _graded if graded else _matched
        return [make(tokenizer, said, f"{file}, example {place}", one) for place, one in enumerate(examples, 1)]

    if graded:
        return Graded(decoder, tokenizer, task, file, read)
    matched = Matched(decoder, tokenizer, task, file, read)
    matched.stop, pattern = str(said.get("stop_string") or ""), str(said.get("output_regex") or "")
    try:
        matched.pattern = re.compile(pattern) if pattern else None
    except re.error as error:
        raise UserError(f"{file}: output_regex is no regular expression ({error}): fix it") from None
    return matched


def _said(file: Path) -> Mapping[str, object]:
    try:
        said = json.loads(file.read_bytes())
        if not isinstance(said, dict):
            raise ValueError("it is no object")
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file} cannot be read as JSON ({error}): give a task.json of BIG-bench") from error
    if wrong := [name for name in DEFAULTS if not isinstance(said.get(name, ""), str)]:
        raise UserError(f"{file}: {wrong[0]} is no text: put it in quotes")
    return said


def _prompt(tokenizer: Tokenizer, said: Mapping[str, object], record: records.Record, choices: Sequence[str]) -> Item:
    """Return the item of an example, with the task's words around it."""
    before, asks, answers, choice = (str(said.get(name, default)) for name, default in DEFAULTS.items())
    text = record.get("input", lambda value: isinstance(value, str), "text")
    listed = "".join(f"{choice}{one}" for one in choices) if said.get("append_choices_to_input", True) else ""
    whole = f"{before}{asks}{text}{listed}{answers}"
    return Item(record.place, whole, records.encode(tokenizer, whole))


def _record(tokenizer: Tokenizer, place: str, example: object) -> records.Record:
    if not isinstance(example, dict):
        raise UserError(f"{place} is no object: write input and target")
    return records.Record(tokenizer, place, example)


def _graded(tokenizer: Tokenizer, said: Mapping[str, object], place: str, example: object) -> Item:
    record = _record(tokenizer, place, example)

    def right(value: object) -> bool:
        return isinstance(value, dict) and bool(value) and all(type(one) in (int, float) for one in value.values())

    worth = record.get("target_scores", right, "an object of choices and numbers")
    assert isinstance(worth, dict)
    found = _prompt(tokenizer, said, record, [*worth])
    tokens = tuple(records.encode(tokenizer, choice) for choice in worth)
    if not all(tokens):
        raise record.fail("target_scores", "has an empty choice: fill it")
    values = [float(one) for one in worth.values()]
    return found._replace(choices=tokens, labels=tuple(worth), label=int(np.argmax(values)), extra={"worth": values})


def _matched(tokenizer: Tokenizer, said: Mapping[str, object], place: str, example: object) -> Item:
    record = _record(tokenizer, place, example)

    def right(value: object) -> bool:
        several = isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
        return isinstance(value, str) or several

    target = record.get("target", right, "text, or a list of texts")
    truths = (target,) if isinstance(target, str) else tuple(map(str, target))  # pyright: ignore[reportArgumentType]
    return _prompt(tokenizer, said, record, [])._replace(truths=truths)
