"""BIG-bench's task.json: prompts, answers that count, scores; tests/proofs/bigbench_reference.py runs its own code."""

import json
import re
from pathlib import Path

import pytest

from glm_jax.evaluation import bigbench, run
from glm_jax.evaluation.few_shot import NONE, Shots
from glm_jax.evaluation.run import FileReport
from tests.evaluation import toy

A_HALF = {"a": 1 / 2, "b": 1 / 4, " ": 1 / 8, ".": 1 / 16}
STOPS_AND_PATTERNS = [
    (None, bigbench.ANSWER), ("\n", None), (".", None), ("\n", r"([-+]?\d+)[.]{0,1}$"), (None, r"\w+"), ("a", r"x|(b)")
]  # fmt: skip
# an answer, and what counts of it for each of these
ANSWERS = {
    "42.\n7": ["42", "42.\n", "42.", "42", "42", ""],
    " red. blue": [" red", " red. blue", " red.", "", "red", "b"],
    ".a b": ["a b", ".a b", ".a b", "", "a", ""],
    "b a x": ["b a x", "b a x", "b a x", "", "b", "b"],
    "": ["", "", "", "", "", ""],
}


def plan(folder: Path, shots: Shots = NONE, **said: object) -> run.Plan:
    """Return the plan of a task.json."""
    (folder / "data/one").mkdir(parents=True, exist_ok=True)
    (folder / "data/one/task.json").write_text(json.dumps(said))
    task = "name: toy\npath: data\ntype: mul\nmodule: BIGBench\nfile_pattern: '**/task.json'\n"
    (folder / "task.yaml").write_text(task)
    return run.plan(toy.model(A_HALF, length=256).decoder, toy.Bytes(), [folder], shots=shots)


def evaluated(folder: Path, shots: Shots = NONE, **said: object) -> FileReport:
    """Evaluate a task.json."""
    todo = plan(folder, shots, **said)
    assert todo.failures == []
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    return run.report(todo, done, resamples=0)[0].files[0]


def values(report: FileReport) -> dict[str, float]:
    return {name: one.value for name, one in report.estimates.items()}


def test_choices_are_worth_nothing_by_chance(tmp_path: Path) -> None:
    """The likeliest choices are "b" (1/4) before "aaa" (1/8) and "ab" (1/8); the fourth is worth half at best."""
    scores = [{"aaa": 0, "b": 1}, {"aaa": 1, "b": 0}, {"b": 1, "aaa": 0, "ab": 0}, {"b": 0.5, "aaa": 0}]
    examples = [{"input": "so", "target_scores": one} for one in scores]
    found = evaluated(tmp_path, examples=[*examples, examples[0]], task_prefix="Choose.", example_output_prefix="\n")
    chance = 1 / 2 + 1 / 2 + 1 / 3 + 1 / 4
    assert values(found) == pytest.approx({"BIG-bench": 100 * (2.5 - chance) / (4 - chance)})
    assert found.items == 4  # a copy is left out
    assert found.examples[0].text == "Choose.\nQ: so\n  choice: b\n  choice: aaa\n"
    assert [one.right for one in found.examples] == [True, True, True, False]


def test_choices_are_listed_in_an_order_of_their_own() -> None:
    """As numpy's old generator shuffles sorted ones with the seed 42, whatever they are worth."""
    assert bigbench.listing(["b", "a"]) == ["b", "a"] == bigbench.listing(["a", "b"])
    assert bigbench.listing("edcba") == ["b", "e", "c", "a", "d"]


def test_texts_are_matched_exactly(tmp_path: Path) -> None:
    """128 letters "a" are what the model says."""
    examples = [{"input": "so", "target": ["x", "a" * 128]}, {"input": "so", "target": "a"}]
    found = evaluated(tmp_path, examples=examples)
    assert values(found) == {"BIG-bench": 50} and found.examples[0].text == "\nQ: so\nA: "
    other = evaluated(tmp_path, examples=examples, output_regex="a$", stop_string="aaa")
    assert values(other) == {"BIG-bench": 50} and [one.found for one in other.examples] == ["a", "a"]
    other = evaluated(tmp_path, examples=[{"input": "so", "target": " a"}], output_regex="a")
    assert values(other) == {"BIG-bench": 0}


@pytest.mark.parametrize("answer", ANSWERS)
def test_what_counts_of_an_answer(answer: str) -> None:
    found = [bigbench.counting(answer, stop or "", re.compile(pattern) if pattern else None)
             for stop, pattern in STOPS_AND_PATTERNS]  # fmt: skip
    assert found == ANSWERS[answer]


def test_few_shot_prompts(tmp_path: Path) -> None:
    """The task's words come first and once; an example shows its target, or its best choice."""
    choices = {"no": 0, "yes": 1}
    examples = [{"input": "one", "target_scores": choices}, {"input": "two", "target_scores": choices, "target": "oui"}]
    words = {"task_prefix": "Say.", "few_shot_example_separator": "|", "append_choices_to_input": False}
    found = evaluated(tmp_path, Shots(1), examples=examples, **words)
    assert sorted(one.text for one in found.examples) == [
        "Say.\nQ: one\nA: yes|\nQ: two\nA: ", "Say.\nQ: two\nA: oui|\nQ: one\nA: "
    ]  # fmt: skip
    assert (found.shots, found.dropped) == (1, 0)
    examples = [{"input": name * 80, "target": [name, name]} for name in "xyz"]
    found = evaluated(tmp_path, Shots(2), examples=examples, task_prefix="Say.")
    assert (found.shots, found.dropped, found.truncated) == (2, 6, 0)  # 126 tokens: an answer may have 128 of 256
    assert found.examples[0].text[4:] == f"\nQ: {found.examples[0].text[8] * 80}\nA: "


def test_what_is_wrong_is_named(tmp_path: Path) -> None:
    one = {"input": "so", "target": "a"}
    for said, words in (({"output_regex": "("}, "output_regex is no regular expression"),
                        ({"output_regex": "(a)(b)"}, "output_regex has 2 groups: leave one"),
                        ({"few_shot_example_separator": 3}, "few_shot_example_separator is no text"),
                        ({"examples": [one, one, {"input": "so"}]}, "example 3: target is missing")):  # fmt: skip
        assert words in plan(tmp_path, **{"examples": [one], **said}).failures[0].error
    assert "needs as many other items" in plan(tmp_path, Shots(1), examples=[one, one]).failures[0].error
