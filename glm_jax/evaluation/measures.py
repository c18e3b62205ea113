"""From results of items to numbers with intervals: what a measure is, its bootstrap, and the test between two runs.

Every measure is a function of sums over items: accuracy of right answers, a perplexity of nats and words. So one
bootstrap and one permutation test serve them all.
"""

from __future__ import annotations

import dataclasses
import math
import re
import string
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import numpy as np

RESAMPLES = 2000
SEED = 1234
CHUNK = 2**22  # numbers of resampled weights in memory at a time
LARGEST = 20.0  # nats a word: the released code cuts perplexities at exp(20)


@dataclasses.dataclass(frozen=True)
class Measure:
    """How a number follows from sums over items.

    Attributes:
        value: from sums [..., k] of k columns over so many items, to numbers [...].
        higher: whether more is better; None if neither is.
        percent: whether it is a percentage.
    """

    value: Callable[[np.ndarray, int], np.ndarray]
    higher: bool | None = True
    percent: bool = False


def _share(sums: np.ndarray, count: int) -> np.ndarray:
    return 100 * sums[..., 0] / count


def _ratio(sums: np.ndarray, count: int) -> np.ndarray:
    return np.divide(sums[..., 0], sums[..., 1], out=np.zeros_like(sums[..., 0]), where=sums[..., 1] != 0)


def _perplexity(sums: np.ndarray, count: int) -> np.ndarray:
    return np.exp(np.minimum(LARGEST, _ratio(sums, count)))


def _icat(sums: np.ndarray, count: int) -> np.ndarray:
    stereotyped = 100 * _ratio(sums, count)
    return 100 * sums[..., 1] / count * np.minimum(stereotyped, 100 - stereotyped) / 50


# The weights of the sets in the Pile's training split, in percent (arXiv 2101.00027, table 1)
PILE = {
    "Pile-CC": 18.11, "PubMed Central": 14.40, "Books3": 12.07, "OpenWebText2": 10.01, "ArXiv": 8.96, "Github": 7.59,
    "FreeLaw": 6.12, "StackExchange": 5.13, "USPTO Backgrounds": 3.65, "PubMed Abstracts": 3.07,
    "Gutenberg (PG-19)": 2.17, "OpenSubtitles": 1.55, "Wikipedia (en)": 1.53, "DM Mathematics": 1.24,
    "Ubuntu IRC": 0.88, "BookCorpus2": 0.75, "EuroParl": 0.73, "HackerNews": 0.62, "YoutubeSubtitles": 0.60,
    "PhilPapers": 0.38, "NIH ExPorter": 0.30, "Enron Emails": 0.14,
}  # fmt: skip


def _pile(sums: np.ndarray, count: int) -> np.ndarray:
    """Return the mean bits a byte of the sets that there are, by their weights."""
    parts = sums.reshape(*sums.shape[:-1], len(PILE), 2)
    weights = np.array([*PILE.values()]) * (parts[..., 1] > 0)
    return (_ratio(parts, count) * weights).sum(-1) / weights.sum(-1) / math.log(2)


def _normalised(sums: np.ndarray, count: int) -> np.ndarray:
    worth, chance, best = sums[..., 0], sums[..., 1], sums[..., 2]
    return 100 * np.divide(worth - chance, best - chance, out=np.zeros_like(worth), where=best != chance)


def _mean(sums: np.ndarray, count: int) -> np.ndarray:
    return sums[..., 0] / count


def _exponential(numbers: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):  # inf
        return np.exp(numbers)


MEASURES: dict[str, Measure] = {
    "Accuracy": Measure(_share, percent=True),  # right answers
    "Accuracy a token": Measure(_share, percent=True),  # of the choice with the highest log-probability a token
    "F1_mul": Measure(_share, percent=True),  # micro F1; of answers with one label each, that is their accuracy
    "Precision": Measure(_share, percent=True),  # micro, the same
    "Recall": Measure(_share, percent=True),  # micro, the same
    "EM": Measure(_share, percent=True),  # exact matches
    "F1": Measure(_share, percent=True),  # word F1
    "Nats a token": Measure(_ratio, higher=False),  # nats, tokens
    "PPL": Measure(_perplexity, higher=False),  # nats, words
    "BPB": Measure(lambda sums, count: _ratio(sums, count) / math.log(2), higher=False),  # nats, UTF-8 bytes
    "Pile BPB": Measure(_pile, higher=False),  # nats and bytes of each set
    "BIG-bench": Measure(_normalised, percent=True),  # worth of the answers, of chance, of the best ones
    "LMS": Measure(_share, percent=True),  # related choices; arXiv 2004.09456
    "SS": Measure(lambda sums, count: 100 * _ratio(sums, count), None, True),  # stereotypes, related choices
    "ICAT": Measure(_icat, percent=True),  # stereotypes, related choices
    # of lm-eval's tasks, such as mean/acc, by how values of items become one; log-probabilities in nats
    "mean": Measure(_mean, None),
    "perplexity": Measure(lambda sums, count: _exponential(-_mean(sums, count)), higher=False),
    "weighted_perplexity": Measure(lambda sums, count: _exponential(-_ratio(sums, count)), higher=False),  # and units
    "bits_per_byte": Measure(lambda sums, count: -_ratio(sums, count) / math.log(2), higher=False),  # and UTF-8 bytes
    "whole": Measure(_mean, None),  # computed by lm-eval from all items at once
    "CP": Measure(_share, None, True),  # pairs whose stereotype is as likely, or more likely; arXiv 2010.00133
}


def measure(name: str) -> Measure:
    """Return the measure of a name, such as BPB or "BPB/ArXiv", which is that of a part."""
    return MEASURES[name.partition("/")[0]]


def event_name(name: str) -> str:
    """Return the name that a measure has in the events of a run, such as nats_a_token."""
    return name.lower().replace(" ", "_")


class Estimate(NamedTuple):
    """A number with its 95% interval."""

    value: float
    low: float
    high: float
    items: int


def estimate(name: str, columns: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED) -> Estimate:
    """Return a measure of items, with a bootstrap interval over the items.

    Args:
        name: of the measure.
        columns: float64 [n, k], what each of at least one item adds to the sums.
        resamples, seed: of the bootstrap; without resamples, or with a single item, there is no interval.
    """
    value = measure(name).value
    found = float(value(columns.sum(0), len(columns)))
    resamples = resamples if len(columns) > 1 else 0
    drawn = [value(weights @ columns, len(columns)) for weights in _weights(len(columns), resamples, seed)]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975]) if drawn else (math.nan, math.nan)
    return Estimate(found, float(low), float(high), len(columns))


class Difference(NamedTuple):
    """How much larger a measure is in the second of two runs over the same items."""

    first: float
    second: float
    difference: float
    low: float  # 95% interval of the difference
    high: float
    p: float  # of the permutation test, two-sided
    items: int


def compare(
    name: str, first: np.ndarray, second: np.ndarray, *, resamples: int = RESAMPLES, seed: int = SEED
) -> Difference:
    """Compare a measure of two runs over the same items, paired.

    The interval is that of a bootstrap over items. p is the share of random swaps of the two runs' results, item by
    item, whose difference is at least as large as the one found, with one added to both counts.

    Args:
        name: of the measure.
        first, second: float64 [n, k], the columns of the same items.
        resamples, seed: of both.
    """
    value, size = measure(name).value, len(first)
    found = [float(value(columns.sum(0), size)) for columns in (first, second)]
    drawn = [value(w @ second, size) - value(w @ first, size) for w in _weights(len(first), resamples, seed)]
    low, high = np.quantile(np.concatenate(drawn), [0.025, 0.975])
    whole, apart, extreme = first.sum(0), second - first, 0
    difference = found[1] - found[0]
    for swapped in _swaps(len(first), resamples, seed + 1):
        moved = swapped @ apart  # [R, k]
        null = value(second.sum(0) - moved, size) - value(whole + moved, size)
        extreme += int((np.abs(null) >= abs(difference) - 1e-12).sum())
    p = (1 + extreme) / (1 + resamples)
    return Difference(found[0], found[1], difference, float(low), float(high), p, len(first))


def _parts(size: int, resamples: int) -> Iterator[int]:
    """Yield how many resamples of `size` items to draw at a time."""
    together = max(1, CHUNK // size)
    for first in range(0, resamples, together):
        yield min(together, resamples - first)


def _weights(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    """Yield how often each item is drawn, float64 [R, n]."""
    generator = np.random.default_rng(seed)
    for part in _parts(size, resamples):
        yield generator.multinomial(size, np.full(size, 1 / size), part).astype(np.float64)


def _swaps(size: int, resamples: int, seed: int) -> Iterator[np.ndarray]:
    generator = np.random.default_rng(seed)
    for part in _parts(size, resamples):
        yield generator.integers(0, 2, (part, size)).astype(np.float64)


def normalized(text: str) -> str:
    """Return an answer without case, ASCII punctuation, English articles and extra blanks (SQuAD, arXiv 1606.05250)."""
    plain = "".join(character for character in text.lower() if character not in string.punctuation)
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", plain).split())


def exact_match(answer: str, truth: str) -> float:
    """Return 1 if two answers are the same once normalized, else 0."""
    return float(normalized(answer) == normalized(truth))


def word_f1(answer: str, truth: str) -> float:
    """Return the F1 of the words of two normalized answers; 0 if they share none, as two empty ones do."""
    found, expected = normalized(answer).split(), normalized(truth).split()
    shared = (Counter(found) & Counter(expected)).total()
    return 2 * shared / (len(found) + len(expected)) if shared else 0.0


def best(score: Callable[[str, str], float], answer: str, truths: Sequence[str]) -> float:
    """Return the best score of an answer against several; 0 if there are none."""
    return max((score(answer, truth) for truth in truths), default=0.0)
