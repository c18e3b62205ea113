"""Prompts with blanks: what is filled, in which order, what stays, and what is refused."""

import copy
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
from glm_jax.errors import UserError
from glm_jax.inference.examples import heldout
from glm_jax.inference.fill import Piece, fill
from glm_jax.inference.strategies import Sampling
from glm_jax.model import GLMConfig, init

Model = tuple[GLMConfig, dict[str, Any]]

TEXTS = ["the small array returns a new shape of given type", "话说天下大势，分久必合，合久必分。"] * 20


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train(TEXTS, 420))


@pytest.fixture(scope="module")
def model(tokenizer: SentencePieceTokenizer) -> Model:
    cfg = GLMConfig(1, 16, 2, 24, -(-tokenizer.size // 16) * 16, max_length=64)
    return cfg, jax.tree.map(lambda array: array * 3, init(cfg, jax.random.key(0)))


def test_every_blank_is_filled_and_the_rest_of_the_prompt_stays(
    model: Model, tokenizer: SentencePieceTokenizer
) -> None:
    pieces = fill(*model, tokenizer, "the [MASK] array, 分久[MASK]\n  [gMASK]", max_tokens=4)
    assert [piece for piece in pieces if not piece.filled] == [
        Piece("the ", False),
        Piece(" array, 分久", False),
        Piece("\n  ", False),
    ]
    assert [piece.filled for piece in pieces] == [False, True, False, True, False, True]
    assert all("MASK" not in piece.text for piece in pieces)


def test_a_prompt_without_a_blank_is_continued(model: Model, tokenizer: SentencePieceTokenizer) -> None:
    pieces = fill(*model, tokenizer, "the small", max_tokens=3)
    assert pieces[0] == Piece("the small", False) and pieces[1].filled and len(pieces) == 2


def test_the_context_follows_the_released_rules(
    model: Model, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = []

    def record(cfg: GLMConfig, params: Any, context: list[int], blank: int, **settings: Any) -> list[int]:
        asked.append((context, blank, settings["repeats"]))
        return [*tokenizer.encode("new")]

    monkeypatch.setattr("glm_jax.inference.fill.generate", record)
    fill(*model, tokenizer, "[gMASK] the [MASK]", max_tokens=8)
    the, new = tokenizer.encode(" the ").tolist(), tokenizer.encode("new").tolist()
    # [MASK] before [gMASK], whatever the order; no eos after a blank; the fill is context for the next blank
    assert asked[0] == ([tokenizer.gmask, *the, tokenizer.mask], 1 + len(the), True)
    assert asked[1] == ([tokenizer.gmask, *the, *new, tokenizer.eos], 0, False)


def test_a_family_has_its_prefix_and_suffix_around_a_context(
    model: Model, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The original GLM's [CLS] context eos; a blank takes the spaces before it; its pad, which is eos, ends a fill."""
    asked: list[tuple[list[int], int, list[int]]] = []

    def record(cfg: GLMConfig, params: Any, context: list[int], blank: int, **settings: Any) -> list[int]:
        asked.append((context, blank, [token for token in settings["ends"] if not settings["banned"][token]]))
        return [*tokenizer.encode(" new")]

    monkeypatch.setattr("glm_jax.inference.fill.generate", record)
    family = copy.copy(tokenizer)
    family.prefix, family.suffix, family.strips_before_blanks, family.pad = (7, 8), (9,), True, tokenizer.eos
    pieces = fill(*model, family, "the [MASK] of [gMASK]", max_tokens=8)
    the, of, new = (tokenizer.encode(text).tolist() for text in ("the", " of", " new"))
    assert asked[0][:2] == ([7, 8, *the, tokenizer.mask, *of, tokenizer.gmask, 9], 2 + len(the))
    assert asked[1][:2] == ([7, 8, *the, *new, *of, tokenizer.gmask, 9], 2 + len(the + new + of))
    assert asked[0][2] == [tokenizer.eop, tokenizer.eos]
    assert "".join(piece.text for piece in pieces) == "the new of new"
    fill(*model, family, "the [MASK] of", max_tokens=8)
    assert asked[2][0] == [7, 8, *the, tokenizer.mask, *of, 9]  # no eos before the suffix


def test_no_special_token_is_generated(model: Model, tokenizer: SentencePieceTokenizer) -> None:
    for seed in range(5):
        sampling = Sampling(temperature=5.0)
        pieces = fill(*model, tokenizer, "a [MASK]", max_tokens=20, sampling=sampling, seed=seed)
        again = fill(*model, tokenizer, "a [MASK]", max_tokens=20, sampling=sampling, seed=seed)
        assert pieces == again and pieces[1].text


@pytest.mark.parametrize("prompt, words", [("  ", "empty"), ("the small array " * 30 + "[MASK]", "shorten the prompt")])
def test_prompts_that_cannot_be_filled(
    model: Model, tokenizer: SentencePieceTokenizer, prompt: str, words: str
) -> None:
    with pytest.raises(UserError, match=words):
        fill(*model, tokenizer, prompt, max_tokens=8)


def test_examples_show_the_truth_beside_the_fill(model: Model, tokenizer: SentencePieceTokenizer) -> None:
    text = "the small array returns a new shape of given type " * 3
    document = np.array([*tokenizer.encode(text), tokenizer.eos])
    short = np.array([*tokenizer.encode("too short"), tokenizer.eos])
    cfg, params = model
    (example,) = heldout(cfg, params, tokenizer, {"en": [short, document, document]}, count=1)
    assert example.source == "en" and example.text.replace("[MASK]", example.target) in text
    first, second = example.lines("english").split("\n")
    assert first == f"en (english) ...{example.text}..."
    assert second == f"    filled {example.filled!r}, was {example.target!r}"


def test_a_model_that_has_diverged_gives_no_examples(model: Model, tokenizer: SentencePieceTokenizer) -> None:
    document = np.array([*tokenizer.encode("the small array returns a new shape of given type " * 3), tokenizer.eos])
    cfg, params = model
    broken = jax.tree.map(lambda array: array * np.nan, params)
    with pytest.raises(UserError, match="logits are not finite"):
        next(heldout(cfg, broken, tokenizer, {"en": [document] * 9}))
