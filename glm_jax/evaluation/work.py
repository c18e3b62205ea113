"""What a data file asks of a model: choices, answers or windows of text; in units that are done one by one.

The result of a unit is what the model said, as JSON. Measures are computed from results and the file, so that results
can be saved as they come and counted afterwards.
"""

from __future__ import annotations

import abc
import dataclasses
import string
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation import few_shot, measures, records, rows, score
from glm_jax.evaluation.few_shot import Shots
from glm_jax.evaluation.records import Item
from glm_jax.evaluation.rows import Question
from glm_jax.evaluation.score import Answers
from glm_jax.evaluation.task_files import Task
from glm_jax.inference.batch import Decoder
from glm_jax.inference.strategies import Beam, Greedy

Result = Mapping[str, Any]  # of JSON
Batches = Iterator[list[tuple[int, Result]]]
Columns = dict[str, np.ndarray]  # of each measure: what each item adds to its sums, float64 [n, k]

LAMBADA_BANNED = (20068, 146010, 146337)  # ids of icetk that look like quotes
LAMBADA_STARTS = ((46010,), (146337,))  # of these, 46010 is as released, probably for 146010
T = TypeVar("T")
Read = Callable[[Tokenizer, Path, Callable[[records.Record], Item]], list[Item]]


class Example(NamedTuple):
    """An item, the right answer and the model's."""

    text: str
    expected: str
    found: str
    right: bool


class Work(abc.ABC):
    """One data file.

    Attributes:
        decoder: the model that is asked. Another one of the same tokenizer and length may take its place.
        count: units.
        items: what measures count: questions, prompts, documents.
        truncated: items whose context was cut.
        notes: what else a user should know, a line each.
        shots: examples before each question, before any is dropped.
        dropped: how many of these, over all items, had no room.
    """

    decoder: Decoder
    count: int
    items: int
    truncated: int = 0
    notes: tuple[str, ...] = ()
    shots: int = 0
    dropped: int = 0

    @abc.abstractmethod
    def run(self, numbers: Sequence[int]) -> Batches:
        """Do units, and yield a batch of results at a time."""

    @abc.abstractmethod
    def tokens(self, number: int) -> int:
        """Return about how many tokens the model reads and makes for a unit."""

    @abc.abstractmethod
    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the columns of the file's measures from the results of all units."""

    def totals(self, results: Sequence[Result]) -> dict[str, float]:
        """Return measures that are no functions of sums over items; they have no interval."""
        return {}

    @abc.abstractmethod
    def texts(self) -> list[list[str]]:
        """Return what each item says, without few-shot examples: one text, or one for each of its choices."""

    def examples(self, results: Sequence[Result]) -> list[Example]:
        """Return items with what the model made of them."""
        return []


def located(item: Item, act: Callable[[], T]) -> T:
    """Do something about an item, whose place stands before what is wrong."""
    try:
        return act()
    except UserError as error:
        raise UserError(f"{item.place}: {error}") from None


class Asked(Work):
    """Items that ask something, one a unit.

    Attributes:
        separator: what stands between examples of few-shot prompts, and between the last one and the question.
    """

    form = staticmethod(records.choice)
    separator: str = "\n\n"

    def __init__(
        self, decoder: Decoder, tokenizer: Tokenizer, task: Task, file: Path, read: Read = records.read
    ) -> None:
        self.decoder, self._tokenizer, self._task = decoder, tokenizer, task
        self._items = read(tokenizer, file, self.form)
        self.count = self.items = len(self._items)
        self._alone = self._items
        self.answered = [item for item in self._items if item.answers]
        self._fit()

    @abc.abstractmethod
    def _fit(self) -> None:
        """Check that all items have room, and count those whose context is cut."""

    @abc.abstractmethod
    def _room(self, item: Item) -> int:
        """Return how many tokens the context of an item may have."""

    @property
    def asked(self) -> Sequence[Item]:
        """The items as they are asked."""
        return self._items

    def texts(self) -> list[list[str]]:
        """Return the questions with each right answer in its place, or with each choice if none is right."""
        blank, decode = self._task.reading.blank(self._tokenizer), self._tokenizer.decode
        return [
            [decode(few_shot.answered(item.context[item.head :], blank, one)) for one in item.answers or item.choices]
            for item in self._alone
        ]

    def precede(self, pool: Sequence[Item], shots: Shots) -> None:
        """Put examples from a pool before the questions.

        Raises:
            UserError: the pool has too few.
        """
        tokenizer, rooms = self._tokenizer, [self._room(item) for item in self._items]
        separator = tokenizer.encode(self.separator).tolist()
        blank = self._task.reading.blank(tokenizer)
        found = few_shot.precede(self._items, pool, rooms, shots, blank, separator)
        self._items = [
            item._replace(context=one.context, text=tokenizer.decode(one.context, specials=True))
            for item, one in zip(self._items, found, strict=True)
        ]
        self.shots, self.dropped = shots.count, sum(shots.count - one.kept for one in found)
        self._fit()


class Choices(Asked):
    """Questions with choices: the most likely one is the answer."""

    def _fit(self) -> None:
        self._questions = [Question(item.context, item.choices) for item in self._items]
        self._single = all(question.single for question in self._questions)
        cfg, tokenizer, reading = self.decoder.config.model, self._tokenizer, self._task.reading
        self.truncated = 0
        for item, question in zip(self._items, self._questions, strict=True):
            built = located(
                item, lambda question=question: rows.choices(cfg, tokenizer, question, reading, single=self._single)
            )
            self.truncated += built.kept < len(question.context)

    def _room(self, item: Item) -> int:
        cfg, question = self.decoder.config.model, Question(item.context, item.choices)
        return rows.context_room(cfg, self._tokenizer, question, self._task.reading, single=self._single)

    def run(self, numbers: Sequence[int]) -> Batches:
        """Score the choices of questions."""
        asked = [self._questions[number] for number in numbers]
        reading = self._task.reading
        for batch in score.choices(self.decoder, self._tokenizer, asked, reading, single=self._single):
            yield [
                (numbers[place], {"log_probabilities": [one.log_probability for one in found]})
                for place, found in batch
            ]

    def tokens(self, number: int) -> int:
        """Return the tokens of a question and its choices."""
        return len(self._questions[number].context) + sum(map(len, self._questions[number].choices))

    def scores(self, results: Sequence[Result], *, by_token: bool = False) -> list[np.ndarray]:
        """Return the log-probabilities of each item's choices, or those a token."""
        found = [np.array(result["log_probabilities"]) for result in results]
        if not by_token:
            return found
        sizes = [np.array([len(choice) for choice in item.choices]) for item in self._items]
        return [sums / size for sums, size in zip(found, sizes, strict=True)]

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return which answers are right; of choices with several tokens, also by the log-probability a token."""
        labels = [item.label for item in self._items]

        def right(scores: list[np.ndarray]) -> np.ndarray:
            pairs = zip(scores, labels, strict=True)
            return np.array([[float(np.argmax(one) == label)] for one, label in pairs])

        found = dict.fromkeys(self._task.metrics, right(self.scores(results)))
        return found if self._single else {**found, "Accuracy a token": right(self.scores(results, by_token=True))}

    def examples(self, results: Sequence[Result]) -> list[Example]:
        """Return the questions with the right and the chosen answers."""
        chosen = [int(np.argmax(one)) for one in self.scores(results)]
        return [
            Example(item.text, item.labels[item.label], item.labels[guess], guess == item.label)
            for item, guess in zip(self._items, chosen, strict=True)
            if item.label >= 0
        ]


class Cloze(Choices):
    """Questions whose right choice is also scored by itself, which tells models apart that choose alike."""

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return which answers are right, and the nats of each right choice with its tokens."""
        nats = [-one[item.label] for item, one in zip(self._items, self.scores(results), strict=True)]
        tokens = [len(item.choices[item.label]) for item in self._items]
        return {**super().columns(results), "Nats a token": np.array([nats, tokens], float).T}


class Generated(Asked):
    """Prompts whose answers are generated, and compared with right ones."""

    form = staticmethod(records.answered)

    def _fit(self) -> None:
        self._answers, self.truncated = self.answers(), 0
        for item in self._items:
            kept = located(item, lambda item=item: self._prompt(item))
            located(item, lambda kept=kept: rows.context(self._tokenizer, kept, self._task.reading))
            self.truncated += len(kept) < len(item.context)

    def _room(self, item: Item) -> int:
        task = self._task
        return score.prompt_room(self.decoder, self._tokenizer, task.reading, task.limit)

    def _prompt(self, item: Item) -> list[int]:
        task = self._task
        return score.prompt(self.decoder, self._tokenizer, item.context, task.reading, task.limit)

    def answers(self) -> Answers:
        """Return how answers are chosen."""
        task = self._task
        if task.beams == 1:
            return Answers(Greedy(min_tokens=task.min_tokens), task.limit)
        beam = Beam(
            count=task.beams,
            length_penalty=task.length_penalty,
            no_repeat_ngram=task.no_repeat_ngram,
            min_tokens=task.min_tokens,
        )
        return Answers(beam, task.limit)

    def run(self, numbers: Sequence[int]) -> Batches:
        """Generate answers."""
        asked = [self._items[number].context for number in numbers]
        reading = self._task.reading
        for batch in score.answers(self.decoder, self._tokenizer, asked, reading, self._answers):
            yield [
                (numbers[place], {"answers": [one.tokens[: len(one.tokens) - one.ended] for one in found]})
                for place, found in batch
            ]

    def tokens(self, number: int) -> int:
        """Return the tokens of a prompt and its longest answer."""
        return len(self._items[number].context) + self._task.limit

    def answer(self, beams: Sequence[Sequence[int]]) -> str:
        """Return the answer, of beams that come best first."""
        return self._tokenizer.decode(beams[0])

    def judge(self, answer: str, truths: Sequence[str]) -> dict[str, float]:
        """Return what an answer is worth, by measure; the first decides whether it counts as a hit."""
        scores = {"EM": measures.exact_match, "Accuracy": measures.exact_match, "F1": measures.word_f1}
        return {name: measures.best(scores[name], answer, truths) for name in self._task.metrics}

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return what each answer is worth."""
        found = [
            self.judge(self.answer(result["answers"]), item.truths)
            for item, result in zip(self._items, results, strict=True)
        ]
        return {name: np.array([[worth[name]] for worth in found]) for name in found[0]}

    def examples(self, results: Sequence[Result]) -> list[Example]:
        """Return the prompts with the right and the generated answers."""
        found = list[Example]()
        for item, result in zip(self._items, results, strict=True):
            answer = self.answer(result["answers"])
            right = next(iter(self.judge(answer, item.truths).values())) == 1
            found.append(Example(item.text, item.truths[0], answer, right))
        return found


class Lambada(Generated):
    """LAMBADA: the last word of a passage, by beam search without punctuation.

    The answer is the first word of the best beam in which a word and punctuation stand alone; without one, of the best
    beam. Reads records.answered.
    """

    def answers(self) -> Answers:
        """Return a search in which no answer holds, or begins with, punctuation."""
        plain, tokenizer = super().answers(), self._tokenizer
        signs = [tuple(tokenizer.encode(sign).tolist()) for sign in string.punctuation]
        banned = {*LAMBADA_BANNED, *(sign[0] for sign in signs if len(sign) == 1)}
        inside = tuple(sorted(token for token in banned if token < tokenizer.size))
        starts = tuple(one for one in (*LAMBADA_STARTS, *signs) if one and max(one) < tokenizer.size)
        return Answers(dataclasses.replace(plain.options, banned=inside), plain.limit, starts)

    def answer(self, beams: Sequence[Sequence[int]]) -> str:
        """Return the first word of the beam that counts."""
        texts = [self._tokenizer.decode(tokens).strip().split(" ") for tokens in beams]
        ended = (words for words in texts if len(words) > 1 and words[1] in string.punctuation)
        word = next(ended, texts[0])[0]
        return self._tokenizer.decode(self._tokenizer.encode(word).tolist())

    def judge(self, answer: str, truths: Sequence[str]) -> dict[str, float]:
        """Return 1 for the very word."""
        return {"Accuracy": float(any(answer.strip() == truth.strip() for truth in truths))}
