"""Tasks of BIG-bench (arXiv 2206.04615), whose file is a task.json: its examples are choices or answers.

Prompts, the order in which they list choices, what counts of an answer, and scores are those of BIG-bench's own code
(release 1.0.0; see `tests/proofs/bigbench_reference.py`). Its metrics other than these two are not there: a task that
it scores by ROUGE is scored by exact matches.
"""

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
            "choice_prefix": "\n  choice: ", "few_shot_example_separator": "\n"}  # fmt: skip
ANSWER = r"[^\.\?\!\;\n]+"  # what is searched for in an answer if a task.json has neither output_regex nor stop_string
ORDER_SEED = 42  # of the order in which choices are listed
BEST = 1.0  # the worth of the best choice


class Graded(Choices):
    """Examples with `target_scores`: what each choice is worth.

    The measure is the worth of the likeliest choices, 0 being that of choices by chance and 100 a worth of 1.
    """

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the worth of each likeliest choice, of the mean choice, and of the best one that there can be."""
        found = list[tuple[float, float, float]]()
        for item, scores in zip(self._items, self.scores(results), strict=True):
            worth: Sequence[float] = item.extra["worth"]  # pyright: ignore[reportAssignmentType] (from `_read`)
            found.append((worth[int(np.argmax(scores))], sum(worth) / len(worth), BEST))
        return {"BIG-bench": np.array(found)}


class Matched(Generated):
    """Examples with a `target`: the answer is right if it is one of these texts.

    Attributes:
        stop: what ends an answer, and belongs to it (`stop_string`); empty for nothing.
        pattern: what is searched for in it (`output_regex`); None takes all of it.
    """

    stop: str = ""
    pattern: re.Pattern[str] | None = None

    def answer(self, beams: Sequence[Sequence[int]]) -> str:
        """Return the part of the answer that counts."""
        return counting(super().answer(beams), self.stop, self.pattern)

    def judge(self, answer: str, truths: Sequence[str]) -> dict[str, float]:
        """Return 1 for one of the very texts."""
        return {"Accuracy": float(answer in truths)}

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the worth of each answer, between that of none and of all."""
        (right,) = super().columns(results).values()
        return {"BIG-bench": np.hstack([right, np.zeros_like(right), np.ones_like(right)])}


def counting(text: str, stop: str, pattern: re.Pattern[str] | None) -> str:
    """Return the part of an answer that counts: of what ends with the first `stop`, the first match or its group."""
    if stop and (place := text.find(stop)) > 0:
        text = text[: place + len(stop)]
    if pattern is None:
        return text
    found = pattern.search(text)
    return found[pattern.groups] if found and found[pattern.groups] else ""


def open_task(decoder: Decoder, tokenizer: Tokenizer, task: Task, file: Path) -> Work:
    """Read a task.json.

    Raises:
        UserError: it cannot be read, or an example is wrong or has no room in the model's rows.
    """
    said = _said(file)
    examples: object = said.get("examples")
    if not isinstance(examples, list) or not examples:
        raise UserError(f"{file}: examples is missing or empty: it must be a list of objects")
    different = dict[str, tuple[int, object]]()
    for place, one in enumerate(examples, 1):
        different.setdefault(json.dumps(one), (place, one))
    graded = isinstance(examples[0], dict) and "target_scores" in examples[0]

    def read(tokenizer: Tokenizer, file: Path, form: Callable[[records.Record], Item]) -> list[Item]:
        del form
        make = _graded if graded else _matched
        return [make(tokenizer, said, f"{file}, example {place}", one) for place, one in different.values()]

    work = (Graded if graded else Matched)(decoder, tokenizer, task, file, read)
    work.separator = _text(said, "few_shot_example_separator")
    if isinstance(work, Matched):
        work.stop, work.pattern = str(said.get("stop_string") or ""), _pattern(said, file)
    return work


def _pattern(said: Mapping[str, object], file: Path) -> re.Pattern[str] | None:
    given = said.get("output_regex")
    if given is None:
        given = ANSWER if said.get("stop_string") is None else ""
    try:
        pattern = re.compile(str(given)) if given else None
    except re.error as error:
        raise UserError(f"{file}: output_regex is no regular expression ({error}): fix it") from None
    if pattern and pattern.groups > 1:
        raise UserError(f"{file}: output_regex has {pattern.groups} groups: leave one, and write the others as (?:...)")
    return pattern


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


def _text(said: Mapping[str, object], name: str) -> str:
    return str(said.get(name, DEFAULTS[name]))


def _prompt(tokenizer: Tokenizer, said: Mapping[str, object], record: records.Record, choices: Sequence[str]) -> Item:
    """Return the item of an example, with the task's words around it."""
    before, choice = _text(said, "task_prefix"), _text(said, "choice_prefix")
    text = record.get("input", lambda value: isinstance(value, str), "text")
    listed = "".join(f"{choice}{one}" for one in listing(choices)) if said.get("append_choices_to_input", True) else ""
    asked = f"{_text(said, 'example_input_prefix')}{text}{listed}{_text(said, 'example_output_prefix')}"
    head = records.encode(tokenizer, before) if before else ()
    return Item(record.place, before + asked, (*head, *records.encode(tokenizer, asked)), len(head))


def listing(choices: Sequence[str]) -> list[str]:
    """Return choices in the order in which a prompt lists them, which says nothing of their worth."""
    ordered = sorted(choices)
    return [ordered[place] for place in np.random.RandomState(ORDER_SEED).permutation(len(ordered))]


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
    label = int(np.argmax(values))
    answers = _targets(tokenizer, record)[1] if "target" in record.fields else (tokens[label],)
    return found._replace(
        choices=tokens, labels=tuple(worth), label=label, answers=answers, extra={"worth": values}
    )  # fmt: skip


def _matched(tokenizer: Tokenizer, said: Mapping[str, object], place: str, example: object) -> Item:
    record = _record(tokenizer, place, example)
    truths, answers = _targets(tokenizer, record)
    return _prompt(tokenizer, said, record, [])._replace(answers=answers, truths=truths)


def _targets(tokenizer: Tokenizer, record: records.Record) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Return the texts of the right answers, and their tokens."""

    def right(value: object) -> bool:
        several = isinstance(value, list) and bool(value) and all(isinstance(one, str) for one in value)
        return isinstance(value, str) or several

    target = record.get("target", right, "text, or a list of texts")
    truths = (target,) if isinstance(target, str) else tuple(map(str, target))  # pyright: ignore[reportArgumentType]
    return truths, tuple(records.encode(tokenizer, truth) for truth in truths)
