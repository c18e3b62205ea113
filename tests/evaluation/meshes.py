"""Scores and answers on meshes of 8 emulated devices; run in a subprocess, prints one JSON object a mesh."""

from __future__ import annotations

import dataclasses
import json
import os

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = "8"
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the work

import jax  # noqa: E402 (after the environment, as jax reads it)
import numpy as np  # noqa: E402

from glm_jax.engine.weights import place  # noqa: E402
from glm_jax.evaluation import rows, score  # noqa: E402
from glm_jax.evaluation.rows import Question, Reading  # noqa: E402
from glm_jax.evaluation.score import Answers  # noqa: E402
from glm_jax.inference.batch import Decoder  # noqa: E402
from glm_jax.inference.strategies import Greedy  # noqa: E402
from glm_jax.model import init  # noqa: E402
from tests.inference import tiny  # noqa: E402
from tests.inference.numbers_tokenizer import Numbers  # noqa: E402

MESHES = [(1, 1, 1), (2, 2, 2), (1, 4, 2), (8, 1, 1)]
GCAUSAL = Reading(gmask=True, causal=True, longest=128)
READINGS = [Reading(longest=128), Reading(gmask=True, longest=128), GCAUSAL, Reading(counts=True, longest=128)]


class Small(Numbers):
    """With special ids inside the tiny model's vocabulary."""

    size = 64
    sop, eop, mask, gmask, smask, eos = tiny.SOP, tiny.EOP, tiny.MASK, tiny.GMASK, 58, 59


TOKENIZER = Small()


def fresh(decoder: Decoder) -> Decoder:
    """Return a decoder with the params of a fresh model, which does not amplify the noise of float32."""
    cfg = decoder.config.model
    return dataclasses.replace(decoder, weights=place(decoder.config, decoder.mesh, init(cfg, jax.random.key(3))))


def questions() -> list[Question]:
    """Return questions of several lengths, with blanks of the other kind in some."""
    generator = np.random.default_rng(0)
    asked = list[Question]()
    for number in range(6):
        context = generator.integers(1, 58, 3 + 5 * number).tolist()
        lengths = generator.integers(1, 5, 2 + number % 3)
        asked.append(Question(context, [generator.integers(1, 58, size).tolist() for size in lengths]))
    return asked


def scores(decoder: Decoder) -> tuple[list[float], list[list[int]]]:
    """Return log-probabilities of choices and windows, which answers are greedy, and generated answers."""
    numbers, steady = list[float](), fresh(decoder)
    for reading in READINGS[:3]:
        found = dict(one for some in score.choices(steady, TOKENIZER, questions(), reading) for one in some)
        numbers += [choice.log_probability for number in range(6) for choice in found[number]]
        cutting = rows.windows(decoder.config.model, TOKENIZER, Reading(gmask=True, longest=24), 8)
        text = np.random.default_rng(1).integers(1, 58, 61).tolist()
        asked = [(text, number) for number in range(cutting.count(len(text)))]
        found = dict(
            one
            for some in score.windows(steady, TOKENIZER, asked, cutting, Reading(gmask=True, longest=24))
            for one in some
        )
        numbers += [found[number].log_probability for number in range(len(asked))]
    prompts = [question.context for question in questions()]
    answers = dict(
        one for some in score.answers(decoder, TOKENIZER, prompts, GCAUSAL, Answers(Greedy(), 5)) for one in some
    )
    made = [answers[number][0].tokens for number in range(len(prompts))]
    other = [[*tokens[:-1], (tokens[-1] + 1) % 58] for tokens in made]
    pairs = [Question(prompt, [*both]) for prompt, *both in zip(prompts, made, other, strict=True)]
    found = dict(one for some in score.choices(decoder, TOKENIZER, pairs, GCAUSAL, single=False) for one in some)
    return numbers + [float(choice.greedy) for number in range(len(pairs)) for choice in found[number]], made


if __name__ == "__main__":
    for sizes in MESHES:
        found, generated = scores(tiny.decoder(tiny.DEEP, *sizes))
        print(json.dumps({"mesh": sizes, "scores": found, "answers": generated}), flush=True)
