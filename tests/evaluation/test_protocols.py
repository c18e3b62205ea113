"""Protocols with values by hand: a toy model says the same everywhere, so every answer can be worked out."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from glm_jax.evaluation import measures, run
from glm_jax.evaluation.run import FileReport
from glm_jax.inference import Model
from tests.evaluation import toy
from tests.evaluation.official_form import jsonl, task

A_HALF = {"a": 1 / 2, "b": 1 / 4, " ": 1 / 8, ".": 1 / 16}


def evaluated(folder: Path, text: str, records: Sequence[object], chosen: Model | None = None) -> FileReport:
    """Evaluate one file of one task."""
    task(folder, "task", f"name: toy\npath: data\n{text}")
    jsonl(folder / "data/all.jsonl", records)
    todo = run.plan((chosen or toy.model(A_HALF)).decoder, toy.Bytes(), [folder])
    assert todo.failures == []
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    ((report,),) = [one.files for one in run.report(todo, done, resamples=100)]
    assert todo.failures == []
    return report


def values(report: FileReport) -> dict[str, float]:
    return {name: one.value for name, one in report.estimates.items()}


@pytest.mark.parametrize("reading", ["", "use_task_mask: true\n", "use_task_mask: true\nunidirectional: true\n"])
def test_choices(reading: str, tmp_path: Path) -> None:
    """ "b" is likelier than "aaa" (1/4, 1/8), but not a token (1/4, 1/2)."""
    choices = {"inputs_pretokenized": "so", "choices_pretokenized": ["aaa", "b"]}
    found = evaluated(tmp_path, f"type: mul\n{reading}", [{**choices, "label": 1}, {**choices, "label": 0}] * 2)
    assert values(found) == {"Accuracy": 50, "Accuracy a token": 50} and found.items == 4
    found = evaluated(tmp_path, f"type: mul\n{reading}", [{**choices, "label": 0}])
    assert values(found) == {"Accuracy": 0, "Accuracy a token": 100}
    assert [(one.found, one.expected, one.right) for one in found.examples] == [("b", "aaa", False)]


def test_contexts_that_are_cut_are_counted(tmp_path: Path) -> None:
    """A row of 64 holds, beside choices of 3 bytes, 59 bytes of context."""
    texts = ["x" * 59, "x" * 60]
    records = [{"inputs_pretokenized": text, "choices_pretokenized": ["aa", "b"], "label": 0} for text in texts]
    assert evaluated(tmp_path, "type: mul\n", records).truncated == 1


def test_stereoset_is_by_token(tmp_path: Path) -> None:
    """The stereotype "aaa" wins by token, though "b", which is unrelated, is likelier."""
    record = {"inputs_pretokenized": "so", "choices_pretokenized": ["b", "aaa", "bb"], "bias_type": "race", "ID": "1",
              "goal_label": ["unrelated", "stereotype", "anti-stereotype"]}  # fmt: skip
    other = {**record, "goal_label": ["stereotype", "anti-stereotype", "unrelated"]}
    nothing = {**record, "goal_label": ["stereotype", "unrelated", "anti-stereotype"], "bias_type": "gender"}
    found = evaluated(tmp_path, "type: mul\nmodule: x.StereoSetTask\nuse_task_mask: true\n",
                      [record, record, other, nothing])  # fmt: skip
    assert values(found) == pytest.approx({
        "LMS": 75, "SS": 200 / 3, "ICAT": 75 * (100 / 3) / 50,
        "LMS/race": 100, "SS/race": 200 / 3, "ICAT/race": 100 * (100 / 3) / 50,
        "LMS/gender": 0, "SS/gender": 0, "ICAT/gender": 0,
    })  # fmt: skip


def test_crows_pairs_are_pairs(tmp_path: Path) -> None:
    def sentence(pair: int, side: int, text: str, bias: str) -> dict[str, object]:
        return {"inputs_pretokenized": "", "choices_pretokenized": [text], "label": 0, "pair_ID": pair,
                "sent_ID": side, "bias_type": bias}  # fmt: skip

    records = [sentence(0, 1, "ab", "age"), sentence(0, 0, "bb", "age"),  # leans towards the stereotype
               sentence(1, 0, "aa", "age"), sentence(1, 1, "aaa", "age"),  # does not: 1/8 against 1/4
               sentence(2, 0, "ba", "race"), sentence(2, 1, "ab", "race"),  # as likely, which counts
               sentence(3, 1, "b", "race"), sentence(3, 0, "aaa", "race")]  # leans: 1/4 against 1/8  # fmt: skip
    found = evaluated(tmp_path, "type: mul\nmodule: x.CrowsPairTask\n", records)
    assert values(found) == pytest.approx({"CP": 75, "CP/age": 50, "CP/race": 100})


def test_answers(tmp_path: Path) -> None:
    """The greedy answer is "aaa"."""
    targets = [["AAA!", "x"], ["aaa b"], ["b"]]
    records = [{"inputs_pretokenized": "so", "targets_pretokenized": some} for some in targets]
    found = evaluated(tmp_path, "type: gen\nmax_gen_length: 3\n", records)
    assert values(found) == pytest.approx({"EM": 100 / 3, "F1": 100 * (1 + 2 / 3) / 3})
    assert [one.right for one in found.examples] == [True, False, False]


@pytest.mark.parametrize("reading", ["", "unidirectional: true\n"])
def test_lambada_takes_a_word_before_punctuation(reading: str, tmp_path: Path) -> None:
    """Punctuation is banned, so no beam has a second word of it, and the best beam's first word is the answer.

    Of four letters without ".", "aaaa" is the best.
    """
    records = [{"inputs_pretokenized": "so", "targets_pretokenized": [word]} for word in ("aaaa", "a", "aaaa ")]
    text = f"type: gen\nmodule: x.LAMBADA\nuse_task_mask: true\nsampling_strategy: BeamSearchStrategy\nnum_beams: 4\n" \
           f"max_gen_length: 4\nno_repeat_ngram_size: 0\n{reading}"  # fmt: skip
    found = evaluated(tmp_path, text, records)
    assert values(found) == pytest.approx({"Accuracy": 200 / 3})


@pytest.mark.parametrize("penalty, expected", [("1.0", "aaaa"), ("0.0", "")])
def test_lambada_takes_the_beam_that_is_best_for_its_length(penalty: str, expected: str, tmp_path: Path) -> None:
    """Ending at once has the largest sum, log 0.2 = -1.609; that of "aaaa" is 4 log 0.65 = -1.723.

    The search divides them by (5 + length) / 6: by 38 / 6 and 41 / 6, as contexts count as 32 tokens. -0.2541 is less
    than -0.2522.
    """
    text = f"type: gen\nmodule: x.LAMBADA\nuse_task_mask: true\nsampling_strategy: BeamSearchStrategy\nnum_beams: 4\n" \
           f"max_gen_length: 4\nno_repeat_ngram_size: 0\nlength_penalty: {penalty}\n"  # fmt: skip
    chosen = toy.model({"a": 0.65, "b": 0.14}, ends=0.2)
    found = evaluated(tmp_path, text, [{"inputs_pretokenized": "so", "targets_pretokenized": ["aaaa"]}], chosen)
    assert found.examples[0].found == expected and values(found) == {"Accuracy": 100 * (expected == "aaaa")}


def test_words_and_bytes_of_text(tmp_path: Path) -> None:
    """Three words of "ab": 8 bytes, of which 3 a, 3 b and 2 blanks."""
    folder = tmp_path / "lm"
    task(folder, "task", "name: toy\npath: data\ntype: lm\nuse_task_mask: true\nfile_pattern: '*.txt'\n")
    (folder / "data").mkdir()
    (folder / "data/a.txt").write_text("ab ab ab")
    todo = run.plan(toy.model(A_HALF).decoder, toy.Bytes(), [folder])
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    ((report,),) = [one.files for one in run.report(todo, done, resamples=0)]
    nats = math.log(2) * (3 * 1 + 3 * 2 + 2 * 3)
    assert values(report) == pytest.approx(
        {"PPL": math.exp(nats / 3), "BPB": nats / math.log(2) / 8, "Nats a token": nats / 8}, rel=1e-5
    )


def test_the_text_with_fewer_nats_may_be_the_worse_one(tmp_path: Path) -> None:
    """Four words "a" have 4 log 2 + 3 log 8 nats, and the word "bb" only 2 log 4; a word of them has fewer."""
    task(tmp_path, "task", "name: toy\npath: data\ntype: lm\nuse_task_mask: true\nfile_pattern: '*.txt'\n")
    (tmp_path / "data").mkdir()
    (tmp_path / "data/long.txt").write_text("a a a a")
    (tmp_path / "data/short.txt").write_text("bb")
    todo = run.plan(toy.model(A_HALF).decoder, toy.Bytes(), [tmp_path])
    done = dict(result for batch in run.run(todo, {}) for result in batch.results)
    long, short = run.report(todo, done, resamples=0)[0].files
    assert sum(result["nats"] for result in done.values()) == pytest.approx(17 * math.log(2), rel=1e-5)
    assert done[0]["nats"] > done[1]["nats"]
    assert values(long)["PPL"] == pytest.approx(2 ** (13 / 4), rel=1e-5)
    assert values(short)["PPL"] == pytest.approx(2**4, rel=1e-5)


def test_the_pile_weighs_its_sets(tmp_path: Path) -> None:
    """Bits a byte: 1 for a, 2 for b; ArXiv and Github have the weights 8.96 and 7.59."""
    texts = [("aaaa", "ArXiv"), ("bb", "Github"), ("a", "Github"), ("", "Books3")]
    records = [{"text": toy.Bytes().encode(text).tolist(), "text_pretokenized": text, "meta": {"pile_set_name": name}}
               for text, name in texts]  # fmt: skip
    pile = "type: lm\nmodule: x.Pile\nuse_task_mask: true\ngeneration_length: 1024\n"
    github = (2 * 2 + 1) / 3
    expected = {"Pile BPB": (8.96 * 1 + 7.59 * github) / (8.96 + 7.59), "BPB": 9 / 7, "BPB/ArXiv": 1,
                "BPB/Github": github}  # fmt: skip
    assert values(evaluated(tmp_path, pile, records)) == pytest.approx(expected, rel=1e-5)
    records[0]["meta"] = {"pile_set_name": "another"}
    assert "Pile BPB" not in values(evaluated(tmp_path, pile, records))
    assert sum(measures.PILE.values()) == pytest.approx(100, abs=0.1)


def test_an_answer_that_begins_as_it_must_not(tmp_path: Path) -> None:
    """Neither with "a" nor with "ba": "bb" comes first, and then what is likeliest. "bba" alone leaves "baa"."""
    from glm_jax.evaluation import score
    from glm_jax.evaluation.rows import Reading
    from glm_jax.inference.strategies import Beam, Greedy

    encode, decode = toy.Bytes().encode, toy.Bytes().decode
    starts = [encode(text).tolist() for text in ("a", "ba")]
    for options in (Greedy(), Beam(count=2)):
        how = score.Answers(options, 3, starts)
        ((_, beams),) = next(score.answers(toy.model(A_HALF).decoder, toy.Bytes(), [[1, 2]], Reading(), how))
        assert decode(beams[0].tokens) == "bba"
        how = how._replace(starts=[starts[0], encode("bba").tolist()])
        ((_, others),) = next(score.answers(toy.model(A_HALF).decoder, toy.Bytes(), [[1, 2]], Reading(), how))
        assert decode(others[0].tokens) == "baa"
        if len(beams) > 1:
            np.testing.assert_allclose(math.exp(beams[0].log_probabilities[0]), 1 / 4, rtol=1e-4)


def test_results_of_a_unit_are_json(tmp_path: Path) -> None:
    task(tmp_path, "task", "name: toy\npath: data\ntype: mul\n")
    jsonl(tmp_path / "data/a.jsonl", [{"inputs_pretokenized": "x", "choices_pretokenized": ["a", "b"], "label": 0}])
    todo = run.plan(toy.model(A_HALF).decoder, toy.Bytes(), [tmp_path])
    (batch,) = run.run(todo, {})
    assert json.loads(json.dumps(batch.results[0][1])) == batch.results[0][1] and batch.tokens == 3
    assert list(run.run(todo, {0: batch.results[0][1]})) == []
