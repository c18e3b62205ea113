"""Rows, log-probabilities, answers and losses against the released evaluation code.

tests/goldens/README.md says what the arrays are and where they come from.
"""

import json
import math
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine import decode
from glm_jax.evaluation import rows, score
from glm_jax.evaluation.rows import Question, Reading
from glm_jax.evaluation.score import TILE, Answers
from glm_jax.inference.scoring import Row
from glm_jax.inference.strategies import Beam, Greedy
from tests.inference.numbers_tokenizer import Numbers
from tests.inference.test_official import config, model

FOLDER = Path(__file__).parent.parent / "goldens/glm130b_inference"
GOLDEN = json.loads((FOLDER / "evaluation.json").read_text())
ARRAYS = dict(np.load(FOLDER / "evaluation.npz"))
CFG = config("glm130b")
TOKENIZER = Numbers()


def reading(given: dict[str, Any]) -> Reading:
    return Reading(
        given["use_task_mask"],
        given.get("unidirectional", False),
        given.get("max_seq_length", 2048),
        given.get("unified_multitask_encoding", False),
    )


def allowed(row: Row) -> np.ndarray:
    """Return who sees whom in a row, as decoding makes it."""
    places, blocks = jnp.arange(len(row.tokens))[None], jnp.array(row.blocks)[None]
    seen = decode.visible(places, jnp.array([row.context]), len(row.tokens))
    return np.asarray(seen & decode.same_block(blocks))[0]


def padded(array: np.ndarray | list[int], size: int) -> np.ndarray:
    return np.pad(array, (0, size - len(array)))


@pytest.mark.parametrize("name", GOLDEN["choice"])
def test_choices(name: str) -> None:
    case = GOLDEN["choice"][name]
    how, single = reading(case["config"]), case["is_single_token"]
    questions = [Question(item["inputs"], item["choices"]) for item in case["items"]]
    assert single == all(question.single for question in questions)
    built = [rows.choices(CFG, TOKENIZER, question, how, single=single) for question in questions]
    size = -(-max(len(one.rows[0].tokens) for one in built) // TILE) * TILE
    for number, (question, one) in enumerate(zip(questions, built, strict=True)):
        (row,) = one.rows
        assert question.context[len(question.context) - one.kept :] == case["kept_inputs"][number]
        np.testing.assert_array_equal(padded(row.tokens, size), ARRAYS[f"choice/{name}/tokens"][number])
        np.testing.assert_array_equal(padded(row.positions, size), ARRAYS[f"choice/{name}/position_ids"][number])
        blocked = np.ones((size, size), bool)
        blocked[: len(row.tokens), : len(row.tokens)] = ~allowed(row)
        np.testing.assert_array_equal(blocked, ARRAYS[f"choice/{name}/blocked"][number])
        places = case["choice_target_ids"][number]
        flat = places * len(question.choices) if single else [place for choice in places for place in choice]
        assert row.places == flat
    found = dict(one for batch in score.choices(model().decoder, TOKENIZER, questions, how) for one in batch)
    best = list[int]()
    for number, question in enumerate(questions):
        sums = [choice.log_probability for choice in found[number]]
        np.testing.assert_allclose(sums, case["log_probs"][number], atol=1e-3)
        assert [choice.tokens for choice in found[number]] == [*map(len, question.choices)]
        best.append(int(np.argmax(sums)))
        if not single:
            by_token = [choice.log_probability / choice.tokens for choice in found[number]]
            assert int(np.argmax(by_token)) == case["argmax_per_token"][number]
    assert best == case["argmax"]
    right = [guess == item["label"] for guess, item in zip(best, case["items"], strict=True)]
    assert 100 * sum(right) / len(right) == case["accuracy"]


@pytest.mark.parametrize("name", GOLDEN["generation"])
def test_answers(name: str) -> None:
    case = GOLDEN["generation"][name]
    given, items, results = case["config"], case["items"], case["results"]
    how, limit, options = reading(given), given["max_gen_length"], Greedy(min_tokens=given["min_gen_length"])
    if given["sampling_strategy"] == "BeamSearchStrategy":
        options = Beam(
            count=given["num_beams"],
            length_penalty=given["length_penalty"],
            no_repeat_ngram=given["no_repeat_ngram_size"],
            min_tokens=given["min_gen_length"],
        )
    decoder, prompts = model().decoder, [item["inputs"] for item in items]
    for number, expected in enumerate(results):
        kept = score.prompt(decoder, TOKENIZER, prompts[number], how, limit)
        assert kept == expected["kept_inputs"]
        context = rows.context(TOKENIZER, kept, how)
        assert context.tokens == expected["tokens"]
        positions = rows.row_positions(CFG, context, len(context.tokens) + limit)
        assert positions.tolist() == expected["position_ids"] + expected["target_position_ids"]
        places, size = jnp.arange(len(context.tokens))[None], 0 if how.causal else len(context.tokens) - 1
        seen = decode.visible(places, jnp.array([size]), len(context.tokens))[0]
        np.testing.assert_array_equal(~seen, ARRAYS[f"generation/{name}/{number}/blocked"])
    batches = score.answers(decoder, TOKENIZER, prompts, how, Answers(options, limit))
    for number, beams in [one for batch in batches for one in batch]:
        expected = results[number]
        assert [one.tokens[: len(one.tokens) - one.ended] for one in beams] == expected["output"]
        if "scores" in expected:
            np.testing.assert_allclose([one.score for one in beams], expected["scores"], atol=1e-3)


def test_answers_in_a_batch() -> None:
    case = GOLDEN["generation_batch"]
    how = Answers(Greedy(min_tokens=0), case["config"]["max_gen_length"])
    batches = score.answers(model().decoder, TOKENIZER, case["inputs"], reading(case["config"]), how)
    found = dict(one for batch in batches for one in batch)
    tokens = [found[number][0].tokens[: len(found[number][0].tokens) - found[number][0].ended] for number in range(3)]
    assert tokens == case["output"]


def losses(texts: list[list[int]], given: dict[str, Any], *, once: bool) -> tuple[list[list[float]], list[int]]:
    """Return the loss of each window of each text, and how many tokens of each text are scored."""
    how = reading(given)
    cutting = rows.windows(CFG, TOKENIZER, how, given["generation_length"])
    asked = [(text, number) for text in texts for number in range(cutting.count(len(text)))]
    batches = score.windows(model().decoder, TOKENIZER, asked, cutting, how, once=once)
    found = dict(one for batch in batches for one in batch)
    each = iter(range(len(asked)))
    windows = [[found[next(each)] for _ in range(cutting.count(len(text)))] for text in texts]
    return [[-one.log_probability for one in some] for some in windows], [sum(o.tokens for o in s) for s in windows]


@pytest.mark.parametrize("name", GOLDEN["lm"])
def test_windows(name: str) -> None:
    case = GOLDEN["lm"][name]
    how, text = reading(case), case["text_tokens"]
    cutting = rows.windows(CFG, TOKENIZER, how, case["generation_length"])
    assert cutting.count(len(text)) == case["windows"]
    for number in range(case["windows"]):
        row = rows.window(CFG, TOKENIZER, text, number, cutting, how, once=False)
        given = {
            part: ARRAYS[f"lm/{name}/{number}/{part}"]
            for part in ("tokens", "targets", "position_ids", "loss_masks", "blocked")
        }
        assert row.tokens == given["tokens"].tolist()
        assert row.positions.tolist() == given["position_ids"].tolist()
        assert row.places == np.flatnonzero(given["loss_masks"]).tolist()
        assert row.targets == given["targets"][row.places].tolist()
        np.testing.assert_array_equal(~allowed(row), given["blocked"])
    ((found,), (scored,)) = losses([text], case, once=False)
    np.testing.assert_allclose(found, case["losses"], atol=1e-3, rtol=1e-5)
    assert scored == case["scored_tokens"]
    perplexity = math.exp(min(20, sum(found) / case["num_original_words"]))
    assert perplexity == pytest.approx(case["perplexity"], rel=1e-3)
    ((once,), (scored,)) = losses([text], case, once=True)
    assert scored == len(text)
    if not how.causal:
        assert once == found
    elif len(found) > 1:
        assert once[0] == found[0] and once[1] < found[1]


def test_pile() -> None:
    case = GOLDEN["pile"]
    texts = [one["text"] for one in case["documents"] if one["text"]]
    found, _ = losses(texts, case, once=True)
    assert [len(one) for one in found] == case["windows"]
    np.testing.assert_allclose([loss for one in found for loss in one], case["losses"], atol=1e-3, rtol=1e-5)
