"""Passages with a part taken out, found in running text, and the questions made of them.

LAMBADA (arXiv 1606.06031) asks for the last word of a passage. Here the answer is one of a few choices, all of which
are parts taken out of other passages, so that a small model trained for minutes already does better than chance.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator, Sequence
from typing import NamedTuple

from glm_jax.types import Json

CHOICES = 10
ITEMS = 400  # of a task, at most
LEAST = 20  # of a task: fewer say nothing
BEFORE, AFTER = 300, 150  # characters of English shown on each side of a gap, at most
SHORTEST_BEFORE, SHORTEST_AFTER = 80, 60  # characters, at least
DENSITY = 3  # characters of English that say about as much as one of Chinese

_HAN = "\u4e00-\u9fff"
_WORD = re.compile(r"(?<=\S) ([A-Za-z]{4,})(?= \S)")
_LAST_WORD = re.compile(r"(?<=\S) ([A-Za-z]{3,})(?=[.!?](?:\s|$))")
_PAIR = re.compile(f"(?<=[{_HAN}])([{_HAN}]{{2}})(?=[{_HAN}])")
_LAST_PAIR = re.compile(f"(?<=[{_HAN}])([{_HAN}]{{2}})(?=[。！？])")
_LINE = re.compile(r"(?<=\n)( *)([^\s\d=~^|-][^\n]{29,99})(?=\n|$)")
_SENTENCE = re.compile(r"(?<=[。！？”])([^。！？”\n]{8,60}[。！？])")
_SECTION = re.compile(r"^ *(?:Parameters *\n *-{3,}|Args:|Arguments:) *\n", re.M)
_HEADING = re.compile(r"^ *(?:[A-Z][A-Za-z ]*\n *-{3,}|[A-Z][a-z]+:) *$", re.M)
_ARGUMENT = re.compile(r"^( *)([a-z_]\w+)(?= ?(?:\([^)\n]*\))?:)", re.M)


class Gap(NamedTuple):
    """A passage with a part taken out.

    Attributes:
        before, after: what stands around the part.
        lead: the space that belongs to the part, as tokenizers have it in front of a word; or empty.
        truth: the part.
    """

    before: str
    lead: str
    truth: str
    after: str = ""


def last_words(text: str) -> Iterator[Gap]:
    """Yield English passages up to the last word of a sentence."""
    for found in _LAST_WORD.finditer(text):
        yield from _passage(text, found.start(), " ", found[1])


def last_pairs(text: str) -> Iterator[Gap]:
    """Yield Chinese passages up to the last two characters of a sentence."""
    for found in _LAST_PAIR.finditer(text):
        yield from _passage(text, found.start(), "", found[1], density=DENSITY)


def words(text: str) -> Iterator[Gap]:
    """Yield English passages around a word."""
    for found in _WORD.finditer(text):
        yield from _passage(text, found.start(), " ", found[1], found.end())


def pairs(text: str) -> Iterator[Gap]:
    """Yield Chinese passages around two characters."""
    for found in _PAIR.finditer(text):
        yield from _passage(text, found.start(), "", found[1], found.end(), density=DENSITY)


def lines(text: str) -> Iterator[Gap]:
    """Yield English passages up to a line."""
    for found in _LINE.finditer(text):
        lead = found[1][:1]
        yield from _passage(text, found.start(2) - len(lead), lead, found[2])


def sentences(text: str) -> Iterator[Gap]:
    """Yield Chinese passages up to a sentence."""
    for found in _SENTENCE.finditer(text):
        yield from _passage(text, found.start(), "", found[1], density=DENSITY)


def arguments(text: str) -> Iterator[Gap]:
    """Yield docstrings around the name of an argument that they describe, in the styles of NumPy and Google."""
    for section in _SECTION.finditer(text):
        heading = _HEADING.search(text, section.end())
        for found in _ARGUMENT.finditer(text, section.end(), heading.start() if heading else len(text)):
            lead = found[1][:1]
            yield from _passage(text, found.start(2) - len(lead), lead, found[2], found.end())


def _passage(
    text: str, start: int, lead: str, truth: str, end: int | None = None, *, density: int = 1
) -> Iterator[Gap]:
    """Yield the gap at text[start:end], unless too little stands around it; without `end`, the passage ends there."""
    before = text[max(start - BEFORE // density, 0) : start]
    after = "" if end is None else text[end : end + AFTER // density]
    if start > BEFORE // density and density == 1:
        before = before.partition(" ")[2]  # not from the middle of a word
    short = len(before) < SHORTEST_BEFORE // density or (end is not None and len(after) < SHORTEST_AFTER // density)
    if not short and "MASK]" not in before + truth + after:  # what looks like a blank would be read as one
        yield Gap(before, lead, truth, after)


def questions(found: Sequence[Gap], blank: str, count: int, draw: random.Random) -> list[Json]:
    """Return records for `ITEMS` gaps at most, each with `count` choices: the truth, and truths of other gaps.

    Wrong choices are drawn from all gaps, so that what is frequent is right and wrong equally often. Of some that are
    drawn, those are taken whose lengths are nearest to the right one's, since a sum of log-probabilities favours what
    is short.

    Args:
        found: gaps; if their truths are fewer than `count`, no question can be asked.
        blank: what stands in the gap, such as [MASK].
        count: of choices.
        draw: chooses gaps and choices.
    """
    known = sorted({gap.truth for gap in found})
    if len(known) < count:
        return []
    records = list[Json]()
    for gap in draw.sample(found, min(ITEMS, len(found))):
        drawn = [one.truth for one in draw.sample(found, min(4 * count, len(found)))]  # as often as they are right
        others = [truth for truth in dict.fromkeys(drawn) if truth != gap.truth]
        if len(others) < count - 1:
            others = [truth for truth in draw.sample(known, count) if truth != gap.truth]
        wrong = sorted(others, key=lambda truth: abs(len(truth) - len(gap.truth)))[: count - 1]
        choices = [gap.truth, *wrong]
        draw.shuffle(choices)
        records.append({
            "inputs_pretokenized": f"{gap.before}{blank}{gap.after}",
            "choices_pretokenized": [f"{gap.lead}{choice}" for choice in choices],
            "label": choices.index(gap.truth),
        })  # fmt: skip
    return records
