"""The names of tasks, and what each of them asks."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping

from glm_jax.evaluation.tasks import gaps
from glm_jax.evaluation.tasks.gaps import CHOICES, Gap

UNIDIRECTIONAL = "-unidirectional"  # the end of the name of a variant whose contexts are seen from left to right


@dataclasses.dataclass(frozen=True)
class Cloze:
    """A task whose questions are gaps in held-out text.

    Attributes:
        language: of the text.
        find: yields the gaps of a document.
        gmask: whether the blank is [gMASK], which ends the passage; else [MASK], inside of it.
        choices: of a question.
    """

    language: str
    find: Callable[[str], Iterator[Gap]]
    gmask: bool
    choices: int = CHOICES


CLOZES: Mapping[str, Cloze] = {
    "last_word_en": Cloze("en", gaps.last_words, gmask=True),
    "last_word_zh": Cloze("zh", gaps.last_pairs, gmask=True),
    "blank_en": Cloze("en", gaps.words, gmask=False),
    "blank_zh": Cloze("zh", gaps.pairs, gmask=False),
    "next_line_en": Cloze("en", gaps.lines, gmask=True, choices=4),
    "next_line_zh": Cloze("zh", gaps.sentences, gmask=True, choices=4),
    "argument_en": Cloze("en", gaps.arguments, gmask=False),
}
SENTIMENT = "sentiment_zh"
NAMES = (*CLOZES, SENTIMENT)


def is_name(place: str) -> bool:
    """Whether this is the name of a task or of its variant."""
    return place.removesuffix(UNIDIRECTIONAL) in NAMES
