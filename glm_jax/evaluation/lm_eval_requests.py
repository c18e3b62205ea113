"""What lm-eval asks of a model, answered in batches: log-likelihoods of continuations and of texts, and answers.

GLM reads a context in both directions, then [gMASK], sop and what follows it from left to right. With a causal reading,
[gMASK] and sop stand before the context, which is read from left to right, too. lm-eval itself is not needed here.
"""

from __future__ import annotations

import abc
import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation import rows, score
from glm_jax.evaluation.rows import Question, Reading
from glm_jax.evaluation.score import Answers
from glm_jax.inference import Model, strategies
from glm_jax.inference.batch import Decoder
from glm_jax.inference.fill import count_repeats, specials
from glm_jax.inference.prompts import find_stop
from glm_jax.inference.strategies import Beam, Generated, Greedy, Options, row_key

STRIDE = 256  # tokens between two windows of a text, as in GLM's own evaluation of language modelling
LONGEST_ANSWER = 256  # tokens, for requests that name no limit; as in lm-eval
SEED = 1234  # of what is drawn; as in lm-eval

Response = tuple[float, bool] | float | str
Batches = Iterator[list[tuple[int, Response]]]


class Reader(NamedTuple):
    """A model, and how it reads.

    Attributes:
        decoder: the model.
        tokenizer: of the model.
        reading: of contexts.
        seed: of sampled answers.
    """

    decoder: Decoder
    tokenizer: Tokenizer
    reading: Reading
    seed: int = SEED

    @classmethod
    def of(cls, model: Model, *, causal: bool = False, seed: int = SEED) -> Reader:
        """Return the reader of a model, in both directions unless `causal`.

        Raises:
            UserError: it has no tokenizer.
        """
        if model.tokenizer is None:
            raise UserError("the model has no tokenizer: convert its weights again, with --tokenizer FILE")
        reading = Reading(gmask=True, causal=causal, longest=model.config.max_length)
        return cls(model.decoder, model.tokenizer, reading, seed)

    @property
    def room(self) -> int:
        """The tokens that a row may have."""
        return rows.room(self.decoder.config.model, self.tokenizer, self.reading)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a text."""
        return self.tokenizer.encode(text).tolist()


class Requests(abc.ABC):
    """Requests of one type.

    Attributes:
        cut: of each request, whether the beginning of its context is left out, as the model's rows are too short.
        notes: what else a user should know, a line each.
    """

    cut: list[bool]
    notes: tuple[str, ...] = ()

    @abc.abstractmethod
    def run(self, numbers: Sequence[int]) -> Batches:
        """Answer some of the requests, and yield a batch of their numbers and responses at a time."""

    @abc.abstractmethod
    def tokens(self, number: int) -> int:
        """Return about how many tokens the model reads and makes for a request."""


def encode_pair(reader: Reader, context: str, continuation: str) -> tuple[list[int], list[int]]:
    """Return the tokens of a context and a continuation, which are those of both together, cut in two.

    Spaces at the end of the context belong to the continuation, as in lm-eval.
    """
    kept = context.rstrip()
    before, whole = reader.encode(kept) if kept else [], reader.encode(context + continuation)
    return before, whole[len(before) :]


class Likelihoods(Requests):
    """(context, continuation): the continuation's log-probability in nats, and whether greedy decoding would give it.

    Successive continuations of one context are scored in one pass if a row holds them all, each blind to the others. An
    empty continuation is certain.
    """

    def __init__(self, reader: Reader, asked: Sequence[tuple[str, str]]) -> None:
        """Encode the requests.

        Raises:
            UserError: a continuation is longer than the model's rows.
        """
        self._reader, self.cut = reader, []
        self._pairs = list[tuple[tuple[int, ...], list[int]]]()
        for context, continuation in asked:
            before, after = encode_pair(reader, context, continuation)
            kept = rows.cut(before, reader.room - len(after) - 2, f"continuations of {len(after)} tokens")
            self._pairs.append((tuple(kept), after))
            self.cut.append(len(kept) < len(before))

    def run(self, numbers: Sequence[int]) -> Batches:
        """Score continuations."""
        decoder, tokenizer, reading, _ = self._reader
        if certain := [number for number in numbers if not self._pairs[number][1]]:
            yield [(number, (0.0, True)) for number in certain]
        groups = self._groups([number for number in numbers if self._pairs[number][1]])
        asked = [Question(self._pairs[group[0]][0], [self._pairs[number][1] for number in group]) for group in groups]
        for batch in score.choices(decoder, tokenizer, asked, reading, single=False):
            yield [
                (number, (one.log_probability, one.greedy))
                for place, found in batch
                for number, one in zip(groups[place], found, strict=True)
            ]

    def _groups(self, numbers: Sequence[int]) -> list[list[int]]:
        """Return successive numbers whose continuations fit into one row behind their context."""
        groups, last, size = list[list[int]](), tuple[int, ...](), 0
        for number in numbers:
            context, target = self._pairs[number]
            if groups and context == last and size + len(target) <= self._reader.room:
                groups[-1].append(number)
                size += len(target)
            else:
                groups.append([number])
                last, size = context, len(context) + 2 + len(target)
        return groups

    def tokens(self, number: int) -> int:
        """Return the tokens of a context and its continuation."""
        return sum(map(len, self._pairs[number]))


class Texts(Requests):
    """(text,): its log-probability in nats, from windows as in `rows.windows`, each of its tokens scored once."""

    def __init__(self, reader: Reader, asked: Sequence[tuple[str]]) -> None:
        """Encode the texts.

        Raises:
            UserError: the model's rows are too short for windows.
        """
        self._reader, self.cut = reader, [False] * len(asked)
        self._cutting = rows.windows(reader.decoder.config.model, reader.tokenizer, reader.reading, STRIDE)
        if self._cutting.width < 2:
            raise UserError(f"the model's rows of {reader.room} tokens leave no room for text: use another model")
        self._texts = [reader.encode(text) for (text,) in asked]

    def run(self, numbers: Sequence[int]) -> Batches:
        """Score texts; a text comes with the batch that has the last of its windows."""
        decoder, tokenizer, reading, _ = self._reader
        if certain := [number for number in numbers if not self._texts[number]]:
            yield [(number, 0.0) for number in certain]
        windows = {number: self._cutting.count(len(self._texts[number])) for number in numbers if self._texts[number]}
        units = [(number, window) for number, count in windows.items() for window in range(count)]
        asked, sums = [(self._texts[number], window) for number, window in units], dict.fromkeys(windows, 0.0)
        for batch in score.windows(decoder, tokenizer, asked, self._cutting, reading):
            done = list[tuple[int, Response]]()
            for place, found in batch:
                number = units[place][0]
                sums[number] += found.log_probability
                windows[number] -= 1
                if not windows[number]:
                    done.append((number, sums[number]))
            yield done

    def tokens(self, number: int) -> int:
        """Return the tokens of a text."""
        return len(self._texts[number])


class Generation(NamedTuple):
    """How an answer is generated."""

    options: Options
    limit: int  # tokens
    stops: tuple[str, ...]  # strings that end it


def generation(asked: Mapping[str, object]) -> Generation:
    """Return what lm-eval's arguments of generation mean.

    `until` is a stop string, or several; `max_gen_toks` (also `max_new_tokens`) limits the tokens. With `do_sample`, or
    a `temperature` above 0 unless `do_sample` is false, answers are drawn by `temperature`, `top_k` and `top_p`. With
    `num_beams` they come from beam search. Otherwise they are greedy.

    Raises:
        UserError: an argument is unknown, or its value is not allowed.
    """
    left = dict(asked)
    until, limit = left.pop("until", None) or [], left.pop("max_new_tokens", LONGEST_ANSWER)
    limit, beams = left.pop("max_gen_toks", limit), left.pop("num_beams", 1)
    stops = [until] if isinstance(until, str) else until
    if not isinstance(stops, list | tuple) or not all(isinstance(stop, str) for stop in stops):
        raise UserError(f"until is {str(until)[:60]!r}: it must be a string, or a list of strings")
    for name, value in (("max_gen_toks", limit), ("num_beams", beams)):
        if type(value) is not int or value < 1:
            raise UserError(f"{name} is {str(value)[:60]!r}: it must be a whole number, at least 1")
    assert isinstance(limit, int) and isinstance(beams, int)
    drawn = left.pop("do_sample", None)
    sampling = {name: left.pop(name) for name in ("temperature", "top_k", "top_p") if name in left}
    if left:
        raise UserError(f"{next(iter(left))} is no argument of generation here: known are until, max_gen_toks, "
                        "do_sample, temperature, top_k, top_p and num_beams")  # fmt: skip
    options: Options = Beam(min_tokens=0, count=beams) if beams > 1 else Greedy(min_tokens=0)
    if drawn or (drawn is None and sampling.get("temperature")):
        if beams > 1:
            raise UserError("num_beams and do_sample do not go together: leave one of them out")
        options = strategies.named("sample", min_tokens=0, **sampling)
    return Generation(options, limit, tuple(stop for stop in stops if stop))


class Continuations(Requests):
    """(context, arguments of generation): the text that follows, up to a stop string, which is left out.

    It has no blanks, as all fills of `Model.fill`.
    """

    def __init__(self, reader: Reader, asked: Sequence[tuple[str, Mapping[str, object]]]) -> None:
        """Encode the requests. An answer has no more tokens than half a row.

        Raises:
            UserError: see `generation`.
        """
        self._reader, self.cut = reader, []
        self._asked = list[tuple[list[int], Generation]]()
        most, shortened = max(reader.room // 2, 1), 0
        known = min(reader.tokenizer.size, reader.decoder.config.model.vocab_size)
        banned = tuple(token for token in specials(reader.tokenizer) if token < known)
        for context, arguments in asked:
            how = generation(arguments)
            shortened = max(shortened, how.limit if how.limit > most else 0)
            how = how._replace(options=dataclasses.replace(how.options, banned=banned), limit=min(how.limit, most))
            before = reader.encode(context)
            kept = score.prompt(reader.decoder, reader.tokenizer, before, reader.reading, how.limit)
            self._asked.append((kept, how))
            self.cut.append(len(kept) < len(before))
        repeats = count_repeats([context for context, _ in asked])
        self._keys = [row_key(reader.seed, repeat, text) for repeat, (text, _) in zip(repeats, asked, strict=True)]
        if shortened:
            self.notes = (f"answers have up to {most} tokens, not {shortened}: that is half of the model's rows",)

    def run(self, numbers: Sequence[int]) -> Batches:
        """Generate answers."""
        decoder, tokenizer, reading, _ = self._reader
        for how in dict.fromkeys(self._asked[number][1] for number in numbers):
            alike = [number for number in numbers if self._asked[number][1] == how]
            asked, keys = [self._asked[number][0] for number in alike], [self._keys[number] for number in alike]
            answers = Answers(how.options, how.limit, stops=how.stops)
            for batch in score.answers(decoder, tokenizer, asked, reading, answers, keys):
                yield [(alike[place], self._text(found[0], how.stops)) for place, found in batch]

    def _text(self, found: Generated, stops: Sequence[str]) -> str:
        text = self._reader.tokenizer.decode(found.tokens[: len(found.tokens) - found.ended])
        return text[: find_stop(text, stops)]

    def tokens(self, number: int) -> int:
        """Return the tokens of a context and its longest answer."""
        tokens, how = self._asked[number]
        return len(tokens) + how.limit


TYPES: Mapping[str, Callable[[Reader, Sequence[Any]], Requests]] = {  # by lm-eval's names
    "loglikelihood": Likelihoods,
    "loglikelihood_rolling": Texts,
    "generate_until": Continuations,
}
