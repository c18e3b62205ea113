"""Measures by hand, their intervals by simulation, and the strings of the released code."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from glm_jax.evaluation import measures

GOLDEN = json.loads((Path(__file__).parent.parent / "goldens/glm130b_inference/evaluation.json").read_text())


@pytest.mark.parametrize("case", GOLDEN["strings"], ids=lambda case: case["prediction"])
def test_strings_of_the_released_code(case: dict[str, object]) -> None:
    answer, truth = str(case["prediction"]), str(case["truth"])
    assert [measures.normalized(answer), measures.normalized(truth)] == case["normalized"]
    assert bool(measures.exact_match(answer, truth)) == case["em"]
    assert measures.word_f1(answer, truth) == pytest.approx(case["f1"])


def test_the_best_of_several_answers_counts() -> None:
    assert measures.best(measures.exact_match, "The cat.", ["dog", "cat"]) == 1
    assert measures.best(measures.word_f1, "red cat", ["dog", "cat"]) == pytest.approx(2 / 3)
    assert measures.best(measures.exact_match, "cat", []) == 0


def test_the_pile_of_the_released_code() -> None:
    case = GOLDEN["pile"]
    documents = [one for one in case["documents"] if one["text"]]
    for name, expected in case["bits_per_byte"].items():
        columns = list[tuple[float, float]]()
        losses = iter(case["losses"])
        for document, windows in zip(documents, case["windows"], strict=True):
            nats = sum(next(losses) for _ in range(windows))
            if document["meta"]["pile_set_name"] == name:
                columns.append((nats, len(document["text_pretokenized"].encode())))
        assert measures.estimate(f"BPB/{name}", np.array(columns), resamples=0).value == pytest.approx(expected)


@pytest.mark.parametrize(
    "name, columns, expected",
    [
        ("Accuracy", [[1], [0], [1], [1]], 75),
        ("F1", [[0.5], [1]], 75),
        ("PPL", [[4 * math.log(3), 2], [0, 2]], 3),
        ("PPL", [[100, 1]], math.exp(20)),
        ("BPB", [[math.log(2) * 6, 2]], 3),
        ("SS", [[1, 1], [0, 1], [1, 1], [0, 0]], 200 / 3),
        ("SS", [[0, 0]], 0),
        ("LMS", [[1], [1], [1], [0]], 75),
        ("ICAT", [[1, 1], [0, 1], [1, 1], [0, 0]], 75 * (100 / 3) / 50),
        ("ICAT", [[1, 1], [0, 1]], 100),  # the ideal model
        ("ICAT", [[1, 1], [1, 1]], 0),  # always stereotyped
    ],
)
def test_values_by_hand(name: str, columns: list[list[float]], expected: float) -> None:
    assert measures.estimate(name, np.array(columns, float), resamples=0).value == pytest.approx(expected)


def test_an_interval_holds_the_truth_nineteen_times_in_twenty() -> None:
    generator, inside, items = np.random.default_rng(0), 0, np.zeros((1, 1))
    for number in range(200):
        items = (generator.random((100, 1)) < 0.7).astype(float)
        found = measures.estimate("Accuracy", items, resamples=400, seed=number)
        assert found.low <= found.value <= found.high and found.items == 100
        inside += found.low <= 70 <= found.high
    assert 178 <= inside <= 200
    assert measures.estimate("Accuracy", items) == measures.estimate("Accuracy", items)


def test_a_comparison_is_paired() -> None:
    """Two runs that differ in few items, all one way, differ for sure; unrelated ones of equal worth do not."""
    generator = np.random.default_rng(1)
    first = (generator.random((400, 1)) < 0.5).astype(float)
    second = first.copy()
    second[np.flatnonzero(first[:, 0] == 0)[:12]] = 1  # 3 points, all gained
    found = measures.compare("Accuracy", first, second)
    assert found.difference == pytest.approx(3) and 0 < found.low < 3 < found.high
    # of 12 items all moved one way: 2 / 2^12
    assert found.p == pytest.approx(2 / 2**12, abs=2e-3)
    other = generator.permutation(first)
    assert measures.compare("Accuracy", first, other).p > 0.5  # the same number of right answers
    assert measures.compare("Accuracy", first, first).p == 1


def test_the_test_is_as_often_wrong_as_it_says() -> None:
    generator, wrong = np.random.default_rng(2), 0
    for number in range(300):
        first, second = ((generator.random((60, 1)) < 0.6).astype(float) for _ in range(2))
        wrong += measures.compare("Accuracy", first, second, resamples=300, seed=number).p <= 0.05
    assert wrong <= 28  # 15 expected; 28 is beyond three deviations
