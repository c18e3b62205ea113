"""What a model says to many questions at once: log-probabilities of choices, losses of windows, generated answers.

All functions yield a batch of results at a time, the longest rows first, so that callers can save them as they come. In
a run of several processes all must make the same calls.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.evaluation import rows
from glm_jax.evaluation.rows import Choices, Question, Reading, Windows
from glm_jax.inference import scoring
from glm_jax.inference.batch import Decoder, Generation, Job, batch_limit, bucket, generate
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.fill import TURNS
from glm_jax.inference.prompts import find_stop
from glm_jax.inference.scoring import Losses, Row, Scored
from glm_jax.inference.strategies import Beam, Generated, Options, Request

TILE = 32  # the released code pads contexts to a multiple of this many tokens, and its beam search counts the padding

T = TypeVar("T")
Batches = Iterator[list[tuple[int, T]]]  # the numbers of questions and their results


def choices(
    decoder: Decoder,
    tokenizer: Tokenizer,
    questions: Sequence[Question],
    reading: Reading,
    *,
    single: bool | None = None,
) -> Batches[list[Scored]]:
    """Score the choices of questions.

    Args:
        decoder: the model.
        tokenizer: of the model.
        questions: any number; see `rows.choices`.
        reading: of the task.
        single: whether all choices of the file are one token, if `questions` are not the whole file.

    Raises:
        UserError: see `rows.choices`; or NotFinite.
    """
    alone = all(question.single for question in questions) if single is None else single

    def build(number: int) -> Choices:
        return rows.choices(decoder.config.model, tokenizer, questions[number], reading, single=alone)

    def finish(number: int, found: Losses) -> list[Scored]:
        ends = [*itertools.accumulate(map(len, questions[number].choices), initial=0)]
        return [Scored.of(Losses(found.nats[a:b], found.likeliest[a:b])) for a, b in itertools.pairwise(ends)]

    sizes = [len(question.context) + sum(map(len, question.choices)) for question in questions]
    return _batches(decoder, sizes, lambda number: build(number).rows, finish)


def windows(
    decoder: Decoder,
    tokenizer: Tokenizer,
    asked: Sequence[tuple[Sequence[int], int]],
    cutting: Windows,
    reading: Reading,
    *,
    once: bool = True,
) -> Batches[Scored]:
    """Score windows of texts, which have no fewer tokens than they begin with.

    Args:
        decoder: the model.
        tokenizer: of the model.
        asked: the tokens of a text, and the number of one of its windows.
        cutting: from `rows.windows`.
        reading, once: see `rows.window`.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """

    def build(number: int) -> list[Row]:
        tokens, place = asked[number]
        return [rows.window(decoder.config.model, tokenizer, tokens, place, cutting, reading, once=once)]

    sizes = [min(len(tokens) - place * cutting.stride, cutting.width) for tokens, place in asked]
    return _batches(decoder, sizes, build, lambda _, found: Scored.of(found))


class Answers(NamedTuple):
    """How answers are generated."""

    options: Options
    limit: int  # tokens
    starts: Sequence[Sequence[int]] = ()  # what no answer begins with
    stops: Sequence[str] = ()  # an answer ends soon after one of these strings; beams go on

    @property
    def beams(self) -> int:
        """The number of rows of a prompt."""
        return self.options.count if isinstance(self.options, Beam) else 1


def prompt_room(decoder: Decoder, tokenizer: Tokenizer, reading: Reading, limit: int) -> int:
    """Return how many tokens a prompt may have, so that an answer of `limit` tokens has room; it may be below 0."""
    return rows.room(decoder.config.model, tokenizer, reading) - limit - 2


def prompt(decoder: Decoder, tokenizer: Tokenizer, tokens: Sequence[int], reading: Reading, limit: int) -> list[int]:
    """Return the tokens of a prompt that are kept, the last ones, so that an answer of `limit` tokens has room."""
    return [*rows.cut(tokens, prompt_room(decoder, tokenizer, reading, limit), f"answers of {limit} tokens")]


def answers(
    decoder: Decoder,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    reading: Reading,
    how: Answers,
    keys: Sequence[np.ndarray] | None = None,
) -> Batches[list[Generated]]:
    """Generate answers, best first: one, or as many as there are beams.

    The length that divides a beam's score counts padding to a multiple of 32 tokens, and the n-gram ban takes it for
    the first tokens before the answer, as in the released evaluation.

    Args:
        decoder: the model.
        tokenizer: of the model.
        prompts: tokens.
        reading: of the task.
        how: to generate.
        keys: of what is drawn, from `row_key`, one for each prompt.

    Raises:
        UserError: see `prompt` and `rows.context`; or NotFinite.
    """
    ends = tuple(dict.fromkeys((tokenizer.eop, tokenizer.eos)))
    width = decoder.config.model.vocab_size
    vocabulary = Vocabulary(width, min(tokenizer.size, width), ends)
    jobs = list[Job]()
    for number, tokens in enumerate(prompts):
        read = rows.context(tokenizer, prompt(decoder, tokenizer, tokens, reading, how.limit), reading)
        padded = [*read.tokens, *[0] * (-len(read.tokens) % TILE)]
        key = (0, 0) if keys is None else keys[number]
        jobs.append(Job(read, Request(padded, how.limit, how.options, key, how.starts)))
    order = sorted(range(len(jobs)), key=lambda number: -len(jobs[number].context.tokens))
    together = batch_limit(decoder, how.beams)
    for first in range(0, len(order), together):
        numbers = order[first : first + together]
        generation = Generation(decoder, [jobs[number] for number in numbers], vocabulary)
        if how.stops and how.beams == 1:
            generate(generation, how.limit, TURNS, functools.partial(_stopped, generation, tokenizer, how.stops))
        else:
            generation.advance(how.limit)
        yield [*zip(numbers, generation.results(), strict=True)]


def _stopped(generation: Generation, tokenizer: Tokenizer, stops: Sequence[str], ended: np.ndarray) -> np.ndarray:
    """Return which other answers have a stop string in them: bool [jobs]."""
    texts = (tokenizer.decode(found[0].tokens) for found in generation.results())
    return np.array([find_stop(text, stops) is not None for text in texts]) & ~ended


def _batches(
    decoder: Decoder,
    sizes: Sequence[int],
    build: Callable[[int], list[Row]],
    finish: Callable[[int, Losses], T],
) -> Batches[T]:
    """Yield results of questions of about `sizes` tokens, whose rows are built when their turn comes."""
    order = sorted(range(len(sizes)), key=lambda number: -bucket(sizes[number]))
    first = 0
    while first < len(order):
        together = scoring.rows_together(decoder, min(sizes[order[first]] + 2, decoder.config.model.max_length))
        numbers = order[first : first + together]
        built = [build(number) for number in numbers]
        found = dict(scoring.losses(decoder, [row for some in built for row in some]))
        places = itertools.count()
        results = list[tuple[int, T]]()
        for number, some in zip(numbers, built, strict=True):
            nats, likeliest = zip(*(found[next(places)] for _ in some), strict=True)
            results.append((number, finish(number, Losses(np.concatenate(nats), np.concatenate(likeliest)))))
        yield results
        first += together
