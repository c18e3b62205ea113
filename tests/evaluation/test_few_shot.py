"""Examples before questions: which ones, in which form, and how many have room."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from glm_jax.errors import UserError
from glm_jax.evaluation import few_shot, run
from glm_jax.evaluation.few_shot import Shots
from glm_jax.evaluation.records import Item
from glm_jax.evaluation.run import FileReport
from tests.evaluation import toy
from tests.evaluation.official_form import jsonl, task

BLANK = -1


def items(*contexts: str) -> list[Item]:
    """Return items whose answers are their first characters in capitals."""
    return [Item("file, line 1", text, tuple(text.encode()), answers=((ord(text[0].upper()),),)) for text in contexts]


def texts(found: Sequence[few_shot.Assembled]) -> list[str]:
    return [bytes(one.context).decode() for one in found]


def precede(
    asked: Sequence[Item], pool: Sequence[Item], room: int, count: int, seed: int = 0
) -> list[few_shot.Assembled]:
    return few_shot.precede(asked, pool, [room] * len(asked), Shots(count, seed), BLANK, b"|")


def test_an_answer_stands_in_the_blank_or_at_the_end() -> None:
    assert few_shot.answered((1, BLANK, 2), BLANK, (7, 8)) == (1, 7, 8, 2)
    assert few_shot.answered((1, 2), BLANK, (7, 8)) == (1, 2, 7, 8)


def test_examples_are_dropped_whole() -> None:
    """With separators the examples take 3, 4 and 5 tokens, and the question 3."""
    examples = [b"aA", b"bbB", b"cccC"]
    (item,) = items("ddd")
    for room, expected in ((15, b"aA|bbB|cccC|ddd"), (14, b"bbB|cccC|ddd"), (11, b"aA|cccC|ddd"), (10, b"cccC|ddd"),
                           (7, b"bbB|ddd"), (6, b"aA|ddd"), (5, b"ddd"), (2, b"ddd"), (-9, b"ddd")):  # fmt: skip
        found = few_shot.assemble(item, examples, b"|", room)
        assert bytes(found.context) == expected and found.kept == expected.count(b"|")
    headed = item._replace(head=1)
    assert bytes(few_shot.assemble(headed, examples[:1], b"|", 99).context) == b"daA|dd"


def test_no_question_is_its_own_example_and_no_copy_of_it_is() -> None:
    pool = items("a", "b", "a", "c", "a", "d")
    seen = set[str]()
    for seed in range(200):
        found = precede(pool, pool, 99, 2, seed)
        assert found == precede(pool, pool, 99, 2, seed)
        for item, text in zip(pool, texts(found), strict=True):
            *examples, question = text.split("|")
            assert question == item.text and len(examples) == 2
            assert item.text not in {example[0] for example in examples}
            assert len(set(examples)) == 2 or "aA" in examples  # without replacement, but "a" is there three times
        seen.add(texts(found)[1])
    # a question has "aA", "cC" and "dD" in any order, and "aA" twice
    assert seen == {f"{one}|{other}|b" for one in ("aA", "cC", "dD") for other in ("aA", "cC", "dD")
                    if one != other or one == "aA"}  # fmt: skip


def test_other_choices_make_another_question() -> None:
    """Whatever their order; some tasks of BIG-bench have the same text in all items."""
    one, other, copy = (item._replace(choices=choices) for item, choices in zip(
        items("a", "a", "a"), (((1,), (2,)), ((1,), (3,)), ((2,), (1,))), strict=True))  # fmt: skip
    assert texts(precede([one, other], [one, other], 99, 1)) == ["aA|a"] * 2
    with pytest.raises(UserError, match="and there are 0"):
        precede([one, copy], [one, copy], 99, 1)


def test_examples_are_drawn_alike() -> None:
    """Of four examples each is drawn in half of 2,000 pairs; three standard errors are 67."""
    pool = items("a", "b", "c", "d")
    asked = items(*["e"] * 2000)
    drawn = "".join(texts(precede(asked, pool, 99, 2)))
    assert all(abs(drawn.count(name) - 1000) < 67 for name in "ABCD")


def test_one_of_several_answers_is_shown() -> None:
    pool = [Item("", "a", (97,), answers=((49,), (50,)))]
    shown = {text for seed in range(20) for text in texts(precede(items("b"), pool, 9, 1, seed))}
    assert shown == {"a1|b", "a2|b"}


def test_too_few_examples() -> None:
    pool = items("a", "b", "a")
    with pytest.raises(UserError, match="file, line 1: --shots 2 needs as many other items, and there are 1: lower it"):
        precede(pool, pool, 99, 2)


def evaluated(folder: Path, shots: int, length: int = 64) -> tuple[run.Plan, list[FileReport]]:
    todo = run.plan(toy.model({"a": 1 / 2, "b": 1 / 4}, length).decoder, toy.Bytes(), [folder], shots=Shots(shots))
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    return todo, [file for report in run.report(todo, done, resamples=0) for file in report.files]


@pytest.mark.parametrize("reading", ["", "use_task_mask: true\n", "use_task_mask: true\nunidirectional: true\n"])
def test_choices(reading: str, tmp_path: Path) -> None:
    """The toy's tokenizer shows no blanks. A row of 64 holds 59 tokens of context beside "aa" and "b"."""
    blank = {"": "[MASK]", "use_task_mask: true\n": "[gMASK]"}.get(reading, "")
    records = [{"inputs_pretokenized": text, "choices_pretokenized": ["aa", "b"], "label": label}
               for text, label in ((f"one is {blank}.", 0), ("two is ", 1))]  # fmt: skip
    task(tmp_path, "task", f"name: toy\npath: data\ntype: mul\n{reading}")
    jsonl(tmp_path / "data/a.jsonl", records)
    todo, (file,) = evaluated(tmp_path, 1)
    assert todo.failures == [] and (file.shots, file.dropped, file.truncated) == (1, 0, 0)
    hidden = "one is ." if blank else "one is .aa"
    assert {one.text for one in file.examples} == {
        "two is b\n\none is .", f"{'one is aa.' if blank else hidden}\n\ntwo is "}  # fmt: skip
    jsonl(tmp_path / "data/a.jsonl", [{**one, "inputs_pretokenized": "x" * 40 + str(one["label"])} for one in records])
    todo, (file,) = evaluated(tmp_path, 1)
    assert (file.shots, file.dropped, file.truncated) == (1, 2, 0)
    assert {one.text for one in file.examples} == {"x" * 40 + "0", "x" * 40 + "1"}


def test_answers(tmp_path: Path) -> None:
    task(tmp_path, "task", "name: toy\npath: data\ntype: gen\nmax_gen_length: 3\n")
    jsonl(tmp_path / "data/a.jsonl", [{"inputs_pretokenized": f"{name}: ", "targets_pretokenized": [name * 2, "?"]}
                                      for name in "xyz"])  # fmt: skip
    todo, (file,) = evaluated(tmp_path, 2)
    assert todo.failures == [] and (file.shots, file.dropped) == (2, 0)
    orders = ("xyz", "yxz", "xzy", "zxy", "yzx", "zyx")
    possible = {f"{a}: {a}{a}\n\n{b}: {b}{b}\n\n{c}: " for a, b, c in orders}
    assert {one.text for one in file.examples} <= possible and len(file.examples) == 3


@pytest.mark.parametrize("longer, dropped", [(0, {"mul": 0, "gen": 0}), (1, {"mul": 1, "gen": 2})])
def test_examples_fill_a_row_to_its_last_token(longer: int, dropped: dict[str, int], tmp_path: Path) -> None:
    """A row of 64 has a blank, sop, and 3 tokens of choices ("aa" and "b") or of the answer to come.

    The other 59 are for two questions, the answer of one, and two line ends between them.
    """
    choices = [{"inputs_pretokenized": "x" * size, "choices_pretokenized": ["aa", "b"], "label": label}
               for label, size in enumerate((30, 25 + longer))]  # fmt: skip
    answers = [{"inputs_pretokenized": "x" * size, "targets_pretokenized": ["a"]} for size in (30, 26 + longer)]
    for kind, records in (("mul", choices), ("gen", answers)):
        task(tmp_path, kind, f"name: {kind}\npath: {kind}\ntype: {kind}\n" + "max_gen_length: 3\n" * (kind == "gen"))
        jsonl(tmp_path / kind / "a.jsonl", records)
    todo = run.plan(toy.model().decoder, toy.Bytes(), [tmp_path], shots=Shots(1))
    assert todo.failures == [] and [part.work.truncated for part in todo.parts] == [0, 0]
    assert {part.task.kind: part.work.dropped for part in todo.parts} == dropped


def test_examples_of_another_folder(tmp_path: Path) -> None:
    """As MMLU has them: a file of the same name, read like the data; it counts for the digest of what is evaluated."""
    task(tmp_path, "task", "name: toy\npath: test\ntype: mul\nmodule: x.MMLU\nfew_shot_path: dev\n")
    question = {"inputs_pretokenized": "ask ", "choices_pretokenized": ["a", "b"], "label": 0}
    jsonl(tmp_path / "test/stem/one.json", [question])
    todo, files = evaluated(tmp_path, 0)
    assert todo.failures == [] and files[0].shots == 0
    todo, files = evaluated(tmp_path, 1)
    assert "few_shot_path has no file" in todo.failures[0].error and files == []
    jsonl(tmp_path / "dev/stem/one.json", [{**question, "inputs_pretokenized": "show ", "label": 1}])
    todo, (file,) = evaluated(tmp_path, 1)
    assert file.examples[0].text == "show b\n\nask " and file.dropped == 0
    jsonl(tmp_path / "dev/stem/one.json", [{**question, "inputs_pretokenized": "tell ", "label": 1}])
    assert evaluated(tmp_path, 1)[0].digest != todo.digest
    jsonl(tmp_path / "dev/stem/one.json", [question])
    todo, _ = evaluated(tmp_path, 1)
    assert "--shots 1 needs as many other items, and there are 0" in todo.failures[0].error


def test_texts_take_no_examples(tmp_path: Path) -> None:
    task(tmp_path, "task", "name: toy\npath: data\ntype: lm\nuse_task_mask: true\nfile_pattern: '*.txt'\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/a.txt").write_text("ab ab")
    todo, (file,) = evaluated(tmp_path, 3)
    assert todo.failures == [] and file.shots == 0
