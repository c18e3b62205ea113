"""Whether a Chinese review is positive, asked in several ways; the reviews are those of `chinese-reviews`."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence

from glm_jax.data.instructions.samples import LABELS, Prompted
from glm_jax.evaluation.tasks.gaps import ITEMS
from glm_jax.types import Json

LONGEST = 120  # characters of a review
POSITIVE, NEGATIVE = LABELS.values()

# By name: the prompt around a review, and what says that it is positive or negative.
PROMPTS: Mapping[str, tuple[str, str, str]] = {
    "question": ("{}\n这条评论是正面的还是负面的？", POSITIVE, NEGATIVE),  # as in the instructions of that name
    "label": ("评论：{}\n情感：", POSITIVE, NEGATIVE),
    "statement": ("{}\n总的来说，我觉得很[MASK]。", "满意", "失望"),
}


def questions(found: Sequence[Prompted], draw: random.Random) -> dict[str, list[Json]]:
    """Return, for each prompt, records of the same reviews, as many positive as negative ones.

    Args:
        found: the prompts of `chinese-reviews`, whose first lines are the reviews, and their labels.
        draw: chooses reviews.
    """
    reviews = {label: list[str]() for label in (POSITIVE, NEGATIVE)}
    for text, label in found:
        review = text.rpartition("\n")[0]
        if len(review) <= LONGEST:
            reviews[label].append(review)
    each = min(ITEMS // 2, *map(len, reviews.values()))
    chosen = [(review, label) for label, some in reviews.items() for review in draw.sample(some, each)]
    draw.shuffle(chosen)
    return {
        name: [
            {"inputs_pretokenized": prompt.format(review), "choices_pretokenized": answers,
             "label": int(label == NEGATIVE)} for review, label in chosen
        ]
        for name, (prompt, *answers) in PROMPTS.items()
    }  # fmt: skip
