"""Beam search against the released code's results, all sequences of a tiny vocabulary, and the rules in plain Python."""

import functools
import itertools
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.inference import beams
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.strategies import Beam, Generated, Greedy, Request
from glm_jax.interop import sat
from glm_jax.model import GLMConfig, apply

GOLDENS = Path(__file__).parent.parent / "goldens"
SCORE, SWAP = 1e-3, 5e-4
WIDTH, END = 5, 4  # of the tiny vocabulary
TINY = Vocabulary(WIDTH, WIDTH, ends=(END,))

Logits = Callable[[Sequence[tuple[int, tuple[int, ...]]]], np.ndarray]  # [B, V] of (prompt, generated tokens)
choose = jax.jit(lambda strategy, *arguments: strategy.choose(*arguments), static_argnums=0)


def search(requests: list[Request], vocabulary: Vocabulary, logits: Logits, room: int) -> list[list[Generated]]:
    """Search as decoding does it: rows follow their parents, and are given the logits of their own tokens."""
    strategy, settings, state = beams.begin(requests, vocabulary, room)
    rows: list[tuple[int, tuple[int, ...]]] = [(row // strategy.width, ()) for row in range(len(requests) * strategy.width)]
    done = np.repeat(state.done, strategy.width)
    while not done.all():
        choice, state = choose(strategy, logits(rows), settings, state)
        tokens, parents, following = (np.asarray(one) for one in choice)
        rows = [
            rows[row] if done[row] else (rows[row][0], (*rows[parents[row]][1], int(tokens[row])))
            for row in range(len(rows))
        ]
        assert [rows[parent][0] for parent in parents] == [prompt for prompt, _ in rows]
        done = following
    assert np.asarray(state.finite).all()
    live = jax.tree.map(lambda array: np.asarray(array).reshape(len(rows), -1), state.live)
    for row in np.flatnonzero(live.scores[:, 0] > -np.inf):
        assert tuple(live.tokens[row, : live.generated[row, 0]]) == rows[row][1]
    return beams.finish(settings, state)


# The released code


def golden_config() -> GLMConfig:
    sizes = json.loads((GOLDENS / "glm130b/config.json").read_text())
    names = ("num_layers", "hidden_size", "num_attention_heads", "inner_hidden_size", "vocab_size")
    return GLMConfig(*(sizes[name] for name in names), max_length=sizes["max_sequence_length"])


class GoldenModel:
    """Full forwards of the golden model, one for each sequence that is asked for, in batches of one shape."""

    BATCH, LENGTH = 64, 26

    def __init__(self) -> None:
        self.cfg = golden_config()
        self.params = sat.load(GOLDENS / "glm130b/ckpt_tp1", self.cfg)
        self.known: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}

        @jax.jit
        def last_logits(params: Any, tokens: Any, positions: Any, context: Any, last: Any) -> jax.Array:
            keys, queries = jnp.arange(self.LENGTH), jnp.arange(self.LENGTH)[:, None]
            allowed = (keys <= queries) | (keys < context[:, None, None] - 1)  # sop is no context
            logits = apply(self.cfg, params, tokens, positions, allowed & (keys <= queries.clip(context[:, None, None] - 2)))
            return logits[jnp.arange(self.BATCH), last]

        self.last_logits = last_logits

    def logits(self, name: str, case: dict[str, Any], rows: list[tuple[int, ...]]) -> np.ndarray:
        """Return float32 [B, V] for tokens generated after the context of a case."""
        missing = list({row for row in rows if (name, row) not in self.known})
        context = case["context"]
        places = np.arange(self.LENGTH)
        positions = places if case["gmask"] else np.where(places < len(context) - 1, places, case["mask_position"])
        for start in range(0, len(missing), self.BATCH):
            part = missing[start : start + self.BATCH]
            tokens = np.zeros((self.BATCH, self.LENGTH), np.int32)
            last = np.zeros(self.BATCH, np.int32)
            for row, generated in enumerate(part):
                whole = [*context, *generated]
                tokens[row, : len(whole)], last[row] = whole, len(whole) - 1
            size = np.full(self.BATCH, len(context), np.int32)
            found = self.last_logits(self.params, tokens, np.tile(positions, (self.BATCH, 1)), size, last)
            self.known.update(((name, row), logits) for row, logits in zip(part, np.asarray(found), strict=False))
        return np.stack([self.known[name, row] for row in rows])


@functools.cache
def golden_model() -> GoldenModel:
    return GoldenModel()


CASES: dict[str, dict[str, Any]] = json.loads((GOLDENS / "glm130b_inference/beams.json").read_text())


def golden_options(setting: str) -> Beam:
    """Turn nb4_lp0.7_ng3_min0 into options."""
    values = {part.rstrip("0123456789."): part.lstrip("abcdefghijklmnopqrstuvwxyz") for part in setting.split("_")}
    return Beam(
        count=int(values["nb"]),
        length_penalty=float(values.get("lp", 1)),
        no_repeat_ngram=int(values.get("ng", 0)),
        min_tokens=int(values.get("min", 0)),
        banned=tuple(CASES["lambada"]["invalid_slices"]) if "lp" not in values else (),
    )


@pytest.mark.parametrize(
    "name, count, ngram",
    [(name, count, ngram) for name in CASES for count in (4, 16) for ngram in (0, 3) if name != "lambada" or not ngram],
)
def test_beams_of_the_released_code(name: str, count: int, ngram: int) -> None:
    case = CASES[name]
    options = [golden_options(setting) for setting in case["settings"]]
    chosen = [i for i, one in enumerate(options) if (one.count, one.no_repeat_ngram) == (count, ngram)]
    assert len(chosen) == (1 if name == "lambada" else 6)
    requests = [Request(case["context"], case["max_gen_length"], options[i]) for i in chosen]
    vocabulary = Vocabulary(256, 256, ends=tuple(case["end_tokens"]))
    found = search(
        requests, vocabulary, lambda rows: golden_model().logits(name, case, [row for _, row in rows]), room=14
    )
    with np.load(GOLDENS / "glm130b_inference/beams.npz") as arrays:
        every_beam, lengths, every_score = (arrays[f"{name}/{kind}"] for kind in ("beams", "lengths", "scores"))
    for i, results in zip(chosen, found, strict=True):
        scores = every_score[i, :count]
        np.testing.assert_allclose([one.score for one in results], scores, rtol=0, atol=SCORE)
        expected = [beam[:length].tolist() for beam, length in zip(every_beam[i, :count], lengths[i], strict=False)]
        actual = [[*case["context"], *one.tokens] for one in results]
        swapped = [place for place in range(count) if actual[place] != expected[place]]
        for place in swapped:
            assert abs(scores[place] - scores[expected.index(actual[place])]) < SWAP
        assert [one.ended for one in results] == [one.tokens[-1] in case["end_tokens"] for one in results]
        assert "ended" not in case or sum(one.ended for one in results) == case["ended"][i]
