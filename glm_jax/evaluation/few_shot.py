"""Examples before a question: which ones, and how many have room.

An example is a question of the same kind with its answer in the place of its blank. Question and answer are tokenized
apart, as they are where a choice is scored or an answer generated. Examples without room in the model's rows are
dropped whole: none is ever cut.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections import Counter
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from glm_jax.errors import UserError
from glm_jax.evaluation.records import Item


@dataclasses.dataclass(frozen=True)
class Shots:
    """How many examples stand before each question."""

    count: int = 0
    seed: int = 0  # of the choice of examples


NONE = Shots()


class Assembled(NamedTuple):
    """A context with examples before its question."""

    context: tuple[int, ...]
    kept: int  # examples


def answered(context: Sequence[int], blank: int, answer: Sequence[int]) -> tuple[int, ...]:
    """Return the tokens of a question with its answer in its blanks, or at the end if it has none."""
    if blank not in context:
        return *context, *answer
    return tuple(itertools.chain.from_iterable(answer if token == blank else (token,) for token in context))


def _asks(item: Item) -> tuple[object, ...]:
    """Return what makes two items the same question, whatever the order of their choices."""
    return item.context, *sorted(item.choices)


def draw(pool: Sequence[Item], item: Item, copies: int, count: int, generator: np.random.Generator) -> list[Item]:
    """Draw examples for an item without replacement, and neither the item itself nor another that asks the same.

    Args:
        pool: what to draw from.
        item: the question.
        copies: how many of the pool ask the same.
        count: examples to draw.
        generator: draws them.

    Raises:
        UserError: there are not enough.
    """
    if len(pool) - copies < count:
        others = len(pool) - copies
        raise UserError(f"{item.place}: --shots {count} needs as many other items, and there are {others}: lower it")
    places, asked = generator.choice(len(pool), count + copies, replace=False), _asks(item)
    return [pool[place] for place in places if _asks(pool[place]) != asked][:count]


def assemble(item: Item, examples: Sequence[Sequence[int]], separator: Sequence[int], room: int) -> Assembled:
    """Put examples before a question.

    Args:
        item: its context may begin with tokens, `item.head`, that stay before all examples.
        examples: their tokens, in order.
        separator: tokens between examples, and between the last one and the question.
        room: the number of tokens that the context may have. From the last example to the first, one that does not fit
            in what is left is dropped.
    """
    head, question = item.context[: item.head], item.context[item.head :]
    left, kept = room - len(item.context), list[Sequence[int]]()
    for example in reversed(examples):
        if (size := len(example) + len(separator)) <= left:
            kept, left = [example, *kept], left - size
    before = itertools.chain.from_iterable((*example, *separator) for example in kept)
    return Assembled((*head, *before, *question), len(kept))


def precede(
    items: Sequence[Item],
    pool: Sequence[Item],
    rooms: Sequence[int],
    shots: Shots,
    blank: int,
    separator: Sequence[int],
) -> list[Assembled]:
    """Put examples before the questions of a file, always the same for a seed.

    Args:
        items: the questions.
        pool: what the examples of each are drawn from; may be the questions themselves.
        rooms: the number of tokens that the context of each may have.
        shots: how many examples, and the seed.
        blank: the token in whose place answers stand.
        separator: see `assemble`.

    Raises:
        UserError: see `draw`.
    """
    copies, found = Counter(map(_asks, pool)), list[Assembled]()
    for number, (item, room) in enumerate(zip(items, rooms, strict=True)):
        generator = np.random.default_rng((shots.seed, number))
        examples = list[tuple[int, ...]]()
        for one in draw(pool, item, copies[_asks(item)], shots.count, generator):
            answer = one.answers[generator.integers(len(one.answers))]
            examples.append(answered(one.context[one.head :], blank, answer))
        found.append(assemble(item, examples, separator, room))
    return found
