"""Decoding and prompts against the official torch classes and the released generate.py.

tests/goldens/README.md says what the arrays are and where they come from.
"""

import functools
import json
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine import decode
from glm_jax.engine.weights import DecodeConfig, place
from glm_jax.errors import UserError
from glm_jax.inference import Model, prompts
from glm_jax.inference.batch import Decoder, Generation, Job, row_positions
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.prompts import Context
from glm_jax.inference.strategies import Greedy, Request
from glm_jax.interop import sat
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh as meshes
from tests.inference.numbers_tokenizer import Numbers

GOLDENS = Path(__file__).parent.parent / "goldens"
PROMPTS = json.loads((GOLDENS / "glm130b_inference/prompts.json").read_text())
LOGITS = 5e-4


def config(kind: str) -> GLMConfig:
    sizes = json.loads((GOLDENS / kind / "config.json").read_text())
    variant: dict[str, Any] = {"norm": "pre", "position": "learned_2d", "activation": "gelu_tanh"}
    return GLMConfig(
        sizes["num_layers"],
        sizes["hidden_size"],
        sizes["num_attention_heads"],
        sizes["inner_hidden_size"],
        sizes["vocab_size"],
        sizes["max_sequence_length"],
        **(variant if kind == "glm10b_style" else {}),
    )


@functools.cache
def model() -> Model:
    cfg = config("glm130b")
    return Model(cfg, sat.load(GOLDENS / "glm130b/ckpt_tp1", cfg), Numbers())


@pytest.mark.parametrize("kind", ["glm130b", "glm10b_style"])
def test_greedy_decoding_gives_the_official_tokens_and_logits(kind: str) -> None:
    """All prompts of a set in one batch, not stopped at end tokens."""
    cfg = config(kind)
    mesh = meshes.build({"data": 1, "pipeline": 1, "tensor": 1})
    setup = DecodeConfig(cfg, cfg.vocab_size)
    decoder = Decoder(setup, mesh, place(setup, mesh, sat.load(GOLDENS / kind / "ckpt_tp1", cfg)))
    with np.load(GOLDENS / kind / "decode.npz") as arrays:
        golden = [{name: arrays[f"{case}/{name}"] for name in ("prompt", "blank", "generated", "position_ids")}
                  | {name: arrays[f"{case}/{name}"] for name in ("is_gmask", "first_logits", "last_logits")
                     if f"{case}/{name}" in arrays}
                  for case in range(4) if f"{case}/prompt" in arrays]  # fmt: skip
    contexts = [Context(one["prompt"].tolist(), int(one["blank"]), not one.get("is_gmask", True)) for one in golden]
    for one, context in zip(golden, contexts, strict=True):
        given = one["position_ids"]
        np.testing.assert_array_equal(row_positions(cfg, context, given.shape[-1]), given)
    jobs = [Job(context, Request(context.tokens, 16, Greedy())) for context in contexts]
    generation = Generation(decoder, jobs, Vocabulary(cfg.vocab_size, cfg.vocab_size, ends=()))
    generation.advance(7)
    generation.advance(9)
    for one, (found,) in zip(golden, generation.results(), strict=True):
        assert found.tokens == one["generated"].tolist()
        for name, place_ in (("first_logits", 0), ("last_logits", 15)):
            if name in one:
                expected = jax.nn.log_softmax(one[name])[found.tokens[place_]]
                assert found.log_probabilities[place_] == pytest.approx(float(expected), abs=LOGITS)


def answer(filled: Any) -> list[int]:
    return [token for piece in filled.pieces for token in piece.tokens]


def test_every_prompt_is_filled_as_by_the_released_code() -> None:
    tokenizer, cases = Numbers(), PROMPTS["cases"]
    assert len(cases) == 24
    good = {name: case for name, case in cases.items() if case["error"] is None}
    for case in good.values():
        filled = model().fill(case["text"], min_tokens=0, out_seq_length=case["out_seq_length"])
        assert answer(filled) == case["answer"]
    with np.load(GOLDENS / "glm130b_inference/prompts.npz") as arrays:
        for name, case in good.items():
            pieces = prompts.parse(tokenizer, case["text"])
            place_ = prompts.next_blank(pieces, prompts.first_kind(pieces))
            assert place_ is not None
            context = prompts.context(tokenizer, pieces, place_)
            assert context.tokens == arrays[f"{name}/0/seq"].tolist()
            expected = arrays[f"{name}/0/position_ids"]
            np.testing.assert_array_equal(row_positions(config("glm130b"), context, len(expected)), expected)
            blocked = arrays[f"{name}/0/blocked"]
            places, size = jnp.arange(len(blocked))[None], jnp.array([len(context.tokens) - 1])
            np.testing.assert_array_equal(decode.visible(places, size, len(blocked))[0], ~blocked)


@pytest.mark.parametrize("name", [name for name, case in PROMPTS["cases"].items() if case["error"]])
def test_what_the_released_code_cannot_fill_is_refused(name: str) -> None:
    case = PROMPTS["cases"][name]
    with pytest.raises(UserError, match=r"^the prompt has \d+ tokens and leaves no room for a fill in .*: shorten"):
        model().fill(case["text"], min_tokens=0, out_seq_length=case["out_seq_length"])


@pytest.mark.parametrize("case", PROMPTS["beams"], ids=lambda case: str(case["out_seq_length"]))
def test_beams_are_those_of_the_released_code(case: dict[str, Any]) -> None:
    filled = model().fill(
        case["text"],
        "beam",
        count=case["num_beams"],
        length_penalty=case["length_penalty"],
        no_repeat_ngram=case["no_repeat_ngram_size"],
        min_tokens=case["min_gen_length"],
        out_seq_length=case["out_seq_length"],
    )
    found = [[int(token) for token in one.text.split()] for one in filled.alternatives]
    assert found == case["answers"]
    assert answer(filled) == case["answers"][0]
