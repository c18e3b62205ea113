"""Beam search against results of the released code, all sequences of a tiny vocabulary, and the rules in loops."""

import functools
import itertools
import json
import math
from collections.abc import Callable
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

Rows = list[tuple[int, tuple[int, ...]]]  # prompt, generated tokens
Logits = Callable[[Rows], np.ndarray]  # float32 [B, V]
choose = jax.jit(lambda strategy, *arguments: strategy.choose(*arguments), static_argnums=0)


def search(
    requests: list[Request], vocabulary: Vocabulary, logits: Logits, room: int, padded_length: int = 0
) -> list[list[Generated]]:
    """Search as decoding does it: rows follow their parents, and are given the logits of their own tokens."""
    strategy, settings, state = beams.begin(requests, vocabulary, room)
    if padded_length:
        context = np.full_like(settings.context, padded_length)
        settings = settings._replace(context=context, prefix=np.zeros_like(settings.prefix))
    rows: Rows = [(prompt, ()) for prompt in range(len(requests)) for _ in range(strategy.width)]
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
            size = context[:, None, None] - 1  # [B, 1, 1], without sop, which later tokens see as what is before them
            logits = apply(self.cfg, params, tokens, positions, (keys <= queries) | (keys < size))
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


GROUPS = sorted(
    {
        (name, options.count, options.no_repeat_ngram)
        for name, case in CASES.items()
        for options in map(golden_options, case["settings"])
    }
)


@pytest.mark.parametrize(
    "name, count, ngram",
    [pytest.param(*group, marks=[pytest.mark.slow] if group[1] == 16 else []) for group in GROUPS],
)
def test_beams_of_the_released_code(name: str, count: int, ngram: int) -> None:
    case = CASES[name]
    options = [golden_options(setting) for setting in case["settings"]]
    chosen = [i for i, one in enumerate(options) if (one.count, one.no_repeat_ngram) == (count, ngram)]
    assert len(chosen) == (6 if "ended" in case else 1)
    chosen *= 6 // len(chosen)  # one shape compiles once
    requests = [Request(case["context"], case["max_gen_length"], options[i]) for i in chosen]
    vocabulary = Vocabulary(256, 256, ends=tuple(case["end_tokens"]))

    def logits(rows: Rows) -> np.ndarray:
        return golden_model().logits(name, case, [generated for _, generated in rows])

    found = search(requests, vocabulary, logits, room=14, padded_length=case.get("padded_length", 0))
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


# A vocabulary small enough to write down every sequence


def table(seed: int) -> Callable[[tuple[int, ...]], np.ndarray]:
    """Return made-up logits [V] of each sequence."""

    @functools.cache
    def logits(sequence: tuple[int, ...]) -> np.ndarray:
        return np.random.default_rng([seed, len(sequence), *sequence]).normal(0, 1.5, WIDTH).astype(np.float32)

    return logits


TABLES = table(1), table(2)


def of_tables(rows: Rows) -> np.ndarray:
    return np.stack([TABLES[prompt](tokens) for prompt, tokens in rows])


def log_softmax(logits: np.ndarray) -> np.ndarray:
    return logits - np.log(np.exp(logits.astype(np.float64)).sum())


def penalised(total: float, length: int, power: float) -> float:
    return total / ((5 + length) / 6) ** power


Scored = list[tuple[float, tuple[int, ...]]]  # score, generated tokens


def assert_same(found: list[Generated], expected: Scored) -> None:
    assert [tuple(one.tokens) for one in found] == [tokens for _, tokens in expected]
    np.testing.assert_allclose([one.score for one in found], [score for score, _ in expected], rtol=1e-5)


def test_enough_beams_find_the_best_of_all_sequences() -> None:
    context, limit, power = [0, 1, 2], 4, 1.3
    request = Request(context, limit, Beam(count=64, length_penalty=power, min_tokens=0))
    found = search([request, request], TINY, of_tables, room=limit)
    for prompt in range(2):
        every: Scored = []
        for size in range(limit + 1):
            for words in itertools.product(range(END), repeat=size):
                whole = words if size == limit else (*words, END)
                total = sum(log_softmax(TABLES[prompt](whole[:i]))[token] for i, token in enumerate(whole))
                every.append((penalised(total, len(context) + len(whole), power), whole))
        every.sort(reverse=True)
        assert_same(found[prompt][:20], every[:20])
        for one in found[prompt][:20]:
            own = [log_softmax(TABLES[prompt](tuple(one.tokens[:i])))[token] for i, token in enumerate(one.tokens)]
            np.testing.assert_allclose(one.log_probabilities, own, atol=1e-5)


def by_the_rules(
    logits: Callable[[tuple[int, ...]], np.ndarray], context: list[int], limit: int, options: Beam
) -> Scored:
    """Search one prompt with lists and loops, as the rules of the released code read."""
    n, count, power = options.no_repeat_ngram, options.count, options.length_penalty
    live: Scored = [(0.0, ())]
    finished: Scored = []
    for step in range(limit):
        candidates: Scored = []
        for total, tokens in live:
            values = logits(tokens).astype(np.float64)
            for token, added in options.bias:
                values[token] += added
            values[list(options.banned)] = -np.inf
            if step < options.min_tokens:
                values[END] = -np.inf
            after: dict[tuple[int, ...], set[int]] = {}
            for i, token in enumerate(tokens):
                after.setdefault(tuple([*context, *tokens[:i]][-(n - 1) :]), set()).add(token)
            if n:
                values[list(after.get(tuple([*context, *tokens][-(n - 1) :]), set()))] = -np.inf
            shares = np.full(WIDTH, -np.inf) if np.isneginf(values).all() else log_softmax(values)
            candidates += [(total + shares[token], (*tokens, token)) for token in range(WIDTH)]
        candidates = sorted((one for one in candidates if one[0] > -np.inf), reverse=True)[: 2 * count]
        length, live = len(context) + step + 1, []
        for total, tokens in candidates:
            if tokens[-1] == END:
                finished = sorted([(penalised(total, length, power), tokens), *finished], reverse=True)[:count]
            elif len(live) < count:
                live.append((total, tokens))
            else:
                break
        if not live or (len(finished) == count and finished[-1][0] >= penalised(live[0][0], length, power)):
            return finished
    pushed = [(penalised(total, len(context) + limit, power), tokens) for total, tokens in live]
    return sorted([*finished, *pushed], reverse=True)[:count]


@pytest.mark.parametrize("count, ngram", [(1, 0), (2, 2), (3, 3)])
def test_few_beams_follow_the_rules(count: int, ngram: int) -> None:
    numbers = [(0.7, 0, 7, ()), (1.0, 3, 7, ()), (-1.0, 0, 5, ((END, 2.5),)), (2.0, 1, 6, ((END, 1.5), (2, -1.0)))]
    contexts = [[1, 2, 3], [3, 1]]
    early = 0
    for power, least, limit, bias in numbers:
        options = Beam(count=count, length_penalty=power, no_repeat_ngram=ngram, min_tokens=least, bias=bias)
        # two prompts of different limits: each is as it is alone
        requests = [Request(contexts[0], limit, options), Request(contexts[1], limit - 2, options)]
        found = search(requests, TINY, of_tables, room=8)
        for prompt, (context, most, *_) in enumerate(requests):
            expected = by_the_rules(TABLES[prompt], list(context), most, options)
            assert_same(found[prompt], expected)
            early += max(len(tokens) for _, tokens in expected) < most
    assert early  # the stop rule has been at work


def test_the_ban_of_ngrams_reaches_into_the_context_only_with_prefixes() -> None:
    """With n = 3: after the 1 2 of the context came 3, which is banned when 1 2 comes again."""
    tokens, logits = jnp.array([3, 1, 2, 0]), jnp.zeros(WIDTH)
    banned = [
        np.flatnonzero(np.isneginf(beams.without_repeats(logits, jnp.array(prefix), tokens, jnp.int32(count))))
        for prefix, count in (([1, 2], 3), ([1, 2], 2), ([0, 2], 3), ([-1, 2], 3))
    ]
    assert [one.tolist() for one in banned] == [[3], [], [], []]
    alone = beams.without_repeats(logits, jnp.zeros(0, jnp.int32), tokens, jnp.int32(2))  # n = 1: no word twice
    assert np.flatnonzero(np.isneginf(alone)).tolist() == [1, 3]


def test_beams_that_cannot_be_continued_leave_their_places() -> None:
    """Two words, no two words twice, no end token: a beam has at most four pairs, and some get stuck before."""
    options = Beam(count=4, no_repeat_ngram=2, min_tokens=9, banned=(2, 3))
    for limit, left in ((4, 4), (5, 1), (6, 0)):
        (found,) = search([Request([2], limit, options)], TINY, of_tables, room=8)
        assert_same(found, by_the_rules(TABLES[0], [2], limit, options))
        assert len(found) == left


def test_a_search_without_continuations_is_done() -> None:
    """Three words, no word twice, no end token: after three tokens there is nothing left."""
    options = Beam(count=3, no_repeat_ngram=1, min_tokens=5, banned=(3,))
    strategy, settings, state = beams.begin([Request([0], 6, options)], TINY, room=6)
    done = []
    for _ in range(4):
        choice, state = choose(strategy, np.zeros((3, WIDTH), np.float32), settings, state)
        done.append(np.asarray(choice.done).tolist())
    assert done == [[False] * 3] * 3 + [[True] * 3]
    assert beams.finish(settings, state) == [[]]


def test_sampled_beams_are_drawn_without_replacement() -> None:
    logits = np.log(np.array([0.5, 0.25, 0.15, 0.07, 0.03], np.float32))
    number = 4000
    keys = np.asarray(jax.random.key_data(jax.random.split(jax.random.key(7), number)))
    requests = [Request([0], 1, Beam(count=1, deterministic=False, min_tokens=0), key) for key in keys]
    strategy, settings, state = beams.begin(requests, TINY, room=1)
    choice, state = choose(strategy, np.tile(logits, (number, 1)), settings, state)
    p = np.exp(logits)
    live, ended = np.zeros(WIDTH), 0.0
    for first, second in itertools.permutations(range(WIDTH), 2):  # two candidates a step: the better word lives
        chance = p[first] * p[second] / (1 - p[first])
        live[min(first, second)] += chance
        ended += chance * (END in (first, second))
    shares = np.bincount(np.asarray(choice.tokens), minlength=WIDTH) / number
    assert (np.abs(shares - live) < 4 * np.sqrt(live * (1 - live) / number) + 1e-9).all()
    assert abs((np.asarray(state.finished.scores) > -np.inf).mean() - ended) < 4 * math.sqrt(ended / number)
    again, _ = choose(strategy, np.tile(logits, (number, 1)), settings, beams.begin(requests, TINY, room=1)[2])
    np.testing.assert_array_equal(again.tokens, choice.tokens)


def test_done_prompts_stay_and_logits_that_are_not_finite_end_a_prompt() -> None:
    options = Beam(count=2, min_tokens=3)
    strategy, settings, state = beams.begin([Request([0, 1], most, options) for most in (3, 0, 3)], TINY, room=3)
    logits = np.stack([TABLES[0](())] * 6)
    logits[3] = np.nan  # of a prompt that is done
    logits[5] = np.nan  # of an empty place: nobody's logits
    choice, first = choose(strategy, logits, settings, state)
    assert np.asarray(choice.done).tolist() == [False, False, True, True, False, False]
    assert np.asarray(choice.parents).tolist() == [0, 0, 2, 3, 4, 4]
    logits[5] = np.inf
    _, second = choose(strategy, logits, settings, first)
    assert np.asarray(second.finite).tolist() == [True, True, False]
    assert np.asarray(second.done).tolist() == [False, True, True]
    for prompt, before, after in ((1, state, second), (2, first, second)):
        old, new = ([array[prompt] for array in (*one.live, *one.finished)] for one in (before, after))
        jax.tree.map(np.testing.assert_array_equal, old, new)


def test_requests_that_cannot_be_searched_together() -> None:
    for options in (Beam(count=3), Beam(no_repeat_ngram=2), Beam(deterministic=False), Greedy()):
        with pytest.raises(ValueError, match="one beam search"):
            beams.begin([Request([0], 1, Beam()), Request([0], 1, options)], TINY, room=1)
