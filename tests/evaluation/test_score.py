"""Values by hand with a toy model; and one pass, one at a time, any order and any position give the same."""

import dataclasses
import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.evaluation import measures, rows, score
from glm_jax.evaluation.rows import Question, Reading
from glm_jax.evaluation.score import Answers
from glm_jax.inference import batch, scoring
from glm_jax.inference.prompts import Context
from glm_jax.inference.scoring import Scored
from glm_jax.inference.strategies import Beam, Greedy
from tests.evaluation import toy
from tests.evaluation.meshes import GCAUSAL, READINGS, TOKENIZER, fresh, questions, scores
from tests.inference import tiny
from tests.patience import HANG

ROOT = Path(__file__).parent.parent.parent
CHARACTERS = {"a": 1 / 2, "b": 1 / 4, "c": 1 / 8}


def text(characters: str) -> list[int]:
    return toy.Bytes().encode(characters).tolist()


def test_choices_by_hand() -> None:
    """The likeliest choice is not the likeliest a token."""
    model = toy.model(CHARACTERS)
    asked = [Question(text("say"), [text("aaa"), text("b"), text("bc")]), Question(text("x"), [text("c"), text("a")])]
    for reading in (Reading(), Reading(gmask=True), Reading(gmask=True, causal=True), Reading(counts=True)):
        (found,) = score.choices(model.decoder, toy.Bytes(), asked, reading)
        first, second = (dict(found)[number] for number in (0, 1))
        np.testing.assert_allclose([one.log_probability for one in first], np.log([1 / 8, 1 / 4, 1 / 32]), rtol=1e-5)
        np.testing.assert_allclose([one.log_probability for one in second], np.log([1 / 8, 1 / 2]), rtol=1e-5)
        sums = [one.log_probability for one in first]
        by_token = [one.log_probability / one.tokens for one in first]
        assert (np.argmax(sums), np.argmax(by_token)) == (1, 0)


def test_bits_a_byte_of_a_uniform_model_are_8() -> None:
    model, words = toy.model(), "中 two three"
    tokens = text(words * 20)
    for reading in (Reading(gmask=True), Reading(), Reading(gmask=True, causal=True)):
        cutting = rows.windows(model.config, toy.Bytes(), reading, 16)
        asked = [(tokens, number) for number in range(cutting.count(len(tokens)))]
        assert len(asked) > 10
        found = [one for some in score.windows(model.decoder, toy.Bytes(), asked, cutting, reading) for _, one in some]
        nats, scored = -sum(one.log_probability for one in found), sum(one.tokens for one in found)
        assert scored == len(tokens)
        columns = np.array([[nats, len(tokens)]])
        assert measures.estimate("BPB", columns, resamples=0).value == pytest.approx(8, rel=1e-6)
        assert nats / scored == pytest.approx(math.log(256), rel=1e-6)
        perplexity = measures.estimate("PPL", np.array([[nats, 8 * scored]]), resamples=0).value  # 8 words a byte
        assert perplexity == pytest.approx(2, rel=1e-5)


def test_answers_by_hand() -> None:
    model = toy.model(CHARACTERS)
    (found,) = score.answers(
        model.decoder, toy.Bytes(), [text("say"), text("so [")], Reading(), Answers(Greedy(min_tokens=0), 3)
    )
    assert [toy.Bytes().decode(beams[0].tokens) for _, beams in found] == ["aaa", "aaa"]
    how = Answers(Beam(count=4, length_penalty=0.0, min_tokens=0), 2)
    ((_, beams),) = next(iter(score.answers(model.decoder, toy.Bytes(), [text("say")], Reading(gmask=True), how)))
    assert toy.Bytes().decode(beams[0].tokens) == "aa"
    # the four best pairs: aa, then ab and ba, then one of bb, ac, ca
    np.testing.assert_allclose([math.exp(one.score) for one in beams], [1 / 4, 1 / 8, 1 / 8, 1 / 16], rtol=1e-4)


@pytest.mark.parametrize("position", ["rope", "learned_2d", "alibi"])
def test_choices_in_one_pass_equal_one_at_a_time(position: str, monkeypatch: pytest.MonkeyPatch) -> None:
    cfg = dataclasses.replace(tiny.CONFIG, position=position)
    decoder, asked, expected = fresh(tiny.decoder(cfg)), questions(), dict[int, list[Scored]]()
    for reading in READINGS:
        (together,) = score.choices(decoder, TOKENIZER, asked, reading, single=False)
        expected = dict(together)
        pairs = [(number, choice) for number, one in enumerate(asked) for choice in range(len(one.choices))]
        contexts = [rows.context(TOKENIZER, asked[number].context, reading) for number, _ in pairs]
        targets = [asked[number].choices[choice] for number, choice in pairs]
        alone = scoring.score(decoder, [*zip(contexts, targets, strict=True)])
        if reading.counts:  # no context of inference counts so
            (alone,) = score.choices(
                decoder, TOKENIZER, [Question(asked[n].context, [t]) for (n, _), t in zip(pairs, targets, strict=True)],
                reading, single=False,
            )  # fmt: skip
            alone = [found[0] for _, found in sorted(alone)]
        for (number, choice), found in zip(pairs, alone, strict=True):
            assert found.log_probability == pytest.approx(expected[number][choice].log_probability, rel=1e-5)
    monkeypatch.setattr(batch, "SHARES", (1,))
    monkeypatch.setattr(scoring, "SHARES", (1,))
    batches = [*score.choices(decoder, TOKENIZER, asked[::-1], READINGS[-1], single=False)]
    assert len(batches) == len(asked) and all(len(one) == 1 for one in batches)
    for ((number, found),) in batches:
        other = expected[len(asked) - 1 - number]
        np.testing.assert_allclose([c.log_probability for c in found], [c.log_probability for c in other], rtol=1e-5)


def test_what_a_causal_row_is() -> None:
    """The first token of a choice follows the last of the text."""
    row = rows.choices(tiny.CONFIG, TOKENIZER, Question([7, 8], [[1, 2], [3]]), GCAUSAL).rows[0]
    assert row.tokens == [tiny.GMASK, tiny.SOP, 7, 8, 1] and row.places == [3, 4, 3] and row.targets == [1, 2, 3]
    assert row.context == 0 and row.blocks == [0, 0, 0, 0, 1] and row.positions.tolist() == [0, 1, 2, 3, 4]
    context = Context([tiny.GMASK, tiny.SOP, 7, 8], 0, False, causal=True)
    assert rows.context(TOKENIZER, [7, 8], GCAUSAL) == context


def test_rows_with_too_much_in_them() -> None:
    with pytest.raises(UserError, match="^unidirectional needs use_task_mask"):
        Reading(causal=True)
    with pytest.raises(UserError, match="^the text has a blank"):
        rows.context(TOKENIZER, [3, tiny.GMASK], GCAUSAL)
    with pytest.raises(UserError, match="^choices of 127 tokens leave no room"):
        rows.choices(tiny.CONFIG, TOKENIZER, Question([3], [[1] * 127]), Reading())
    crowded = rows.choices(tiny.CONFIG, TOKENIZER, Question([3] * 100, [[1] * 70, [2] * 60]), Reading())
    assert [len(row.tokens) for row in crowded.rows] == [126 - 70 + 1 + 70, 126 - 70 + 1 + 60] and crowded.kept == 56
    with pytest.raises(UserError, match="^answers of 127 tokens leave no room"):
        score.prompt(tiny.decoder(tiny.CONFIG), TOKENIZER, [3], Reading(), 127)


@pytest.mark.slow
def test_a_mesh_changes_nothing() -> None:
    environment = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, "-m", "tests.evaluation.meshes"]
    done = subprocess.run(command, cwd=ROOT, env=environment, text=True, capture_output=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    reports = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [one["mesh"] for one in reports] == [[1, 1, 1], [2, 2, 2], [1, 4, 2], [8, 1, 1]]
    for one in reports[1:]:
        np.testing.assert_allclose(one["scores"], reports[0]["scores"], rtol=1e-5)
        assert one["answers"] == reports[0]["answers"]
    here = scores(tiny.decoder(tiny.DEEP))
    assert here[0][-12:] == [1.0, 0.0] * 6  # what was generated is greedy, with another last token it is not
    np.testing.assert_allclose(here[0], reports[0]["scores"], rtol=1e-5)
