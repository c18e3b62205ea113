"""Generation with a scripted model: what the model is asked, which tokens are chosen, and when generation stops."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.inference import decode, examples, fill
from glm_jax.inference.strategies import GREEDY, Sampling
from glm_jax.model import GLMConfig

CONFIG = GLMConfig(num_layers=1, hidden_size=8, num_heads=2, ffn_size=8, vocab_size=10, max_length=256)
PARAMS = {"embedding": {"word": jnp.zeros((10, 8))}}
MASK, SOP, EOP, EOS = 6, 7, 8, 9
BANNED = np.isin(np.arange(10), [MASK, SOP])


class Script:
    """Stands in for the model: its n-th answer prefers the tokens of `orders[n]`, best first; records every call."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, orders: list[list[int]]) -> None:
        self.orders, self.calls = orders, []
        monkeypatch.setattr(decode, "apply_cached", self._answer)
        monkeypatch.setattr(decode, "init_cache", lambda cfg, *shape, dtype=None: jnp.zeros(shape[:2]))

    def _answer(
        self, cfg: GLMConfig, params: Any, tokens: Any, positions: Any, allowed: Any, cache: Any, place: Any
    ) -> tuple[Any, Any]:
        asked = (np.asarray(tokens), np.asarray(positions), np.asarray(allowed), int(place))
        order = self.orders[min(len(self.calls), len(self.orders) - 1)]
        self.calls.append(asked)
        assert cache.shape == (1, self.calls[0][0].shape[1])
        logits = np.full(CONFIG.vocab_size, -5.0, np.float32)
        logits[order] = -np.arange(len(order)) * 0.5
        answer = np.full((1, asked[0].shape[1], CONFIG.vocab_size), 9.0, np.float32)  # [1, T, V]
        answer[0, -1 if len(self.calls) > 1 else int((asked[0][0] == SOP).argmax())] = logits
        return jnp.asarray(answer), cache


def generate(context: list[int], budget: int, sampling: Sampling = GREEDY, seed: int = 0, **more: Any) -> list[int]:
    settings: dict[str, Any] = {"sop": SOP, "repeats": True, "ends": [EOP, EOS], "banned": BANNED} | more
    with jax.disable_jit():
        return decode.generate(
            CONFIG, PARAMS, context, context.index(MASK), **settings, budget=budget, sampling=sampling,
            key=jax.random.key(seed),
        )  # fmt: skip


@pytest.mark.parametrize("repeats", [True, False])
def test_the_model_is_asked_for_the_row_and_then_for_each_token(monkeypatch: pytest.MonkeyPatch, repeats: bool) -> None:
    script = Script(monkeypatch, [[1], [2], [3], [EOP]])
    assert generate([4, MASK, 5], 9, repeats=repeats) == [1, 2, 3]
    (tokens, positions, allowed, place), *later = script.calls
    assert tokens.tolist() == [[4, MASK, 5, SOP] + [0] * 60] and place == 0
    assert positions[0, :8].tolist() == ([0, 1, 2, 1, 1, 1, 1, 1] if repeats else list(range(8)))
    assert allowed.shape == (1, 64, 64)
    for query in range(3):  # the context sees all of itself, but not sop
        assert np.flatnonzero(allowed[0, query]).tolist() == [0, 1, 2]
    assert np.flatnonzero(allowed[0, 3]).tolist() == [0, 1, 2, 3]
    assert [call[0].tolist() for call in later] == [[[1]], [[2]], [[3]], [[EOP]]]
    for at, (_, again, seen, place) in enumerate(later, 4):
        assert place == at and (again == positions).all()
        assert seen.shape == (1, 1, 64) and np.flatnonzero(seen).tolist() == list(range(at + 1))


@pytest.mark.parametrize(
    "orders, budget, expected",
    [
        ([[EOP, 3], [EOP]], 5, [3]),  # an end at once: no fill is empty, so the next best token comes first
        ([[EOS, EOP, 3, 1], [2], [EOS]], 5, [3, 2]),
        ([[MASK, SOP, 4], [SOP, MASK, 2], [EOP]], 5, [4, 2]),  # banned tokens are skipped everywhere
        ([[1], [EOP]], 5, [1]),
        ([[1], [EOS]], 5, [1]),
        ([[1], [2], [EOP]], 2, [1, 2]),  # the budget ends it
        ([[1], [2], [EOP]], 3, [1, 2]),  # an end as the last token is not part of the fill
        ([[1], [2], [3]], 3, [1, 2, 3]),
        ([[EOP, 5]], 1, [5]),
        ([[1, 2, 3], [2, 1, 3], [3, 2, 1], [1, 2, 3], [2, 3, 1], [EOP, 1]], 9, [1, 2, 3, 1, 2]),  # the best each time
    ],
)
def test_a_fill_ends_at_an_end_or_with_its_budget_and_is_never_empty(
    monkeypatch: pytest.MonkeyPatch, orders: list[list[int]], budget: int, expected: list[int]
) -> None:
    Script(monkeypatch, orders)
    assert generate([4, MASK], budget) == expected


def test_sampling_never_begins_with_an_end_and_takes_a_key_for_each_token(monkeypatch: pytest.MonkeyPatch) -> None:
    keys: list[tuple[int, ...]] = []

    def choose(self: Sampling, logits: Any, key: Any) -> Any:
        keys.append(tuple(np.asarray(jax.random.key_data(key)).tolist()))
        return original(self, logits, key)

    original = Sampling.choose
    monkeypatch.setattr(Sampling, "choose", choose)
    for seed in range(8):
        Script(monkeypatch, [[EOP, EOS, 1, 2], [3, 4, 5], [3, 4, 5], [1, 2, 3], [1, 2, 3]])
        fill = generate([4, MASK], 5, Sampling(temperature=0.3), seed)
        assert fill and fill[0] not in (EOP, EOS)
    assert len(keys) >= 30 and len(set(keys)) == len(keys)


@pytest.mark.parametrize("budget, length", [(60, 64), (61, 64), (62, 128), (125, 128)])
def test_rows_are_as_long_as_they_must_be_in_whole_buckets(
    monkeypatch: pytest.MonkeyPatch, budget: int, length: int
) -> None:
    script = Script(monkeypatch, [[1], [EOP]])
    generate([4, MASK], budget)  # two tokens, sop and the budget
    assert script.calls[0][0].shape == (1, length)


class Letters:
    """A tokenizer of letters: a is 10, b is 11 and so on."""

    pad, unk, eos, mask, gmask, smask, sop, eop, size = 0, 1, 2, 3, 4, 5, 6, 7, 36
    prefix = suffix = ()
    strips_before_blanks = False

    def encode(self, text: str) -> np.ndarray:
        return np.array([ord(letter) - 87 for letter in text], np.int32)

    def decode(self, tokens: Any) -> str:
        return "".join(chr(token + 87) for token in tokens)


LETTERS: Any = Letters()


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[dict[str, Any]]:
    """Replace generation; return the arguments of each call."""
    calls: list[dict[str, Any]] = []

    def record(cfg: Any, params: Any, context: list[int], blank: int, **settings: Any) -> list[int]:
        calls.append({"context": context, "blank": blank, **settings})
        return LETTERS.encode("xyz"[(len(calls) - 1) % 4]).tolist() if len(calls) < 4 else []

    monkeypatch.setattr(fill, "generate", record)
    return calls


MODEL: Any = SimpleNamespace(vocab_size=40, max_length=64)


def test_blanks_are_filled_by_kind_each_with_a_key_of_its_own(asked: list[dict[str, Any]]) -> None:
    pieces = fill.fill(MODEL, "params", LETTERS, "a[gMASK]b[sMASK]c[MASK]d[MASK]", max_tokens=7)
    assert "".join(piece.text for piece in pieces) == "abzcxdy"  # x first, y second, z third, then nothing
    assert [piece.text for piece in pieces if piece.filled] == ["", "z", "x", "y"]
    g, s, m = LETTERS.gmask, LETTERS.smask, LETTERS.mask
    a, b, c, d, x, y, z = LETTERS.encode("abcdxyz").tolist()
    assert [call["context"] for call in asked] == [
        [a, g, b, s, c, m, d, m], [a, g, b, s, c, x, d, m], [a, g, b, s, c, x, d, y, LETTERS.eos],
        [a, g, b, z, c, x, d, y, LETTERS.eos],
    ]  # fmt: skip
    assert [call["blank"] for call in asked] == [5, 7, 3, 1]
    assert [call["repeats"] for call in asked] == [True, True, True, False]
    for call in asked:
        assert call["sop"] == LETTERS.sop and set(call["ends"]) == {LETTERS.eop, LETTERS.eos}
        assert call["budget"] == 7 and call["sampling"] == GREEDY
        banned = {LETTERS.pad, LETTERS.mask, LETTERS.smask, LETTERS.gmask, LETTERS.sop, 36, 37, 38, 39}
        assert set(np.flatnonzero(call["banned"]).tolist()) == banned and len(call["banned"]) == 40
    keys = {tuple(np.asarray(jax.random.key_data(call["key"])).tolist()) for call in asked}
    assert len(keys) == 4


def test_the_seed_and_the_sampling_reach_every_blank(asked: list[dict[str, Any]]) -> None:
    sampling = Sampling(temperature=0.5, top_k=3)
    cfg: Any = SimpleNamespace(vocab_size=40, max_length=67)  # the blank, a letter, sop and the default budget of 64
    for seed in (1234, 5, 5, None):
        more: dict[str, Any] = {} if seed is None else {"seed": seed}
        fill.fill(cfg, "params", LETTERS, "a[MASK]", sampling=sampling, **more)
    first, second, third, default = (np.asarray(jax.random.key_data(call["key"])).tolist() for call in asked)
    assert first != second == third and default == first
    assert all(call["sampling"] is sampling and call["budget"] == 64 for call in asked)


def test_a_fill_gets_what_the_row_has_left(asked: list[dict[str, Any]]) -> None:
    """A row of 64 holds the context (50 letters, the blank, eos), sop and 11 tokens, but no more."""
    said: list[str] = []
    for wanted in (10, 11, 12, 2**62):
        fill.fill(MODEL, "params", LETTERS, "a[MASK]" + "b" * 49, max_tokens=wanted, say=said.append)
    assert [call["budget"] for call in asked] == [10, 11, 11, 11]
    assert said == ["[MASK] gets at most 11 tokens: the prompt has 52, the model's rows hold 64"] * 2


def test_a_prompt_fits_to_the_last_place(asked: list[dict[str, Any]]) -> None:
    """The context (60 letters, the blank, eos) and sop leave one place, and with another letter none."""
    fill.fill(MODEL, "params", LETTERS, "a[MASK]" + "b" * 59, max_tokens=12)
    assert [call["budget"] for call in asked] == [1]
    with pytest.raises(fill.UserError, match="the prompt has 63 tokens and leaves no place .* 64: shorten the prompt"):
        fill.fill(MODEL, "params", LETTERS, "a[MASK]" + "b" * 60, max_tokens=12)
    assert len(asked) == 1


@pytest.mark.parametrize("prompt, words", [("", "empty"), (" \n", "empty"), ("a\ud800", "UTF-8"), ("\udfff", "UTF-8")])
def test_prompts_without_text_or_with_half_a_character_are_refused(prompt: str, words: str) -> None:
    with pytest.raises(fill.UserError, match=words) as raised:
        fill.fill(MODEL, "params", LETTERS, prompt)
    assert "\n" not in str(raised.value)


def shown(
    monkeypatch: pytest.MonkeyPatch, longest: int, refused: int = 0, count: int | None = None
) -> Callable[..., Any]:
    """Return a function that makes examples from documents of the given lengths, with scripted fills."""
    calls: list[tuple[str, dict[str, Any]]] = []

    def answer(cfg: Any, params: Any, tokenizer: Any, prompt: str, **settings: Any) -> list[fill.Piece]:
        calls.append((prompt, settings))
        if len(calls) <= refused:
            raise fill.UserError("too long")
        return [fill.Piece("own", False), fill.Piece("f", True), fill.Piece("g", True)]

    def show(*lengths: int) -> tuple[list[str], list[tuple[str, dict[str, Any]]]]:
        text = np.arange(1000) % 26 + 10
        documents = [np.append(text[:length], LETTERS.eos) for length in lengths]
        more = {} if count is None else {"count": count}
        cfg: Any = SimpleNamespace(max_length=longest)
        found = examples.heldout(cfg, "params", LETTERS, {"src": documents}, **more)
        return [line for example in found for line in example.lines("en").split("\n")], calls

    monkeypatch.setattr(examples, "fill", answer)
    return show


def letters(start: int, stop: int) -> str:
    return "".join("abcdefghijklmnopqrstuvwxyz"[place % 26] for place in range(start, stop))


def test_an_example_is_three_tokens_in_the_middle_with_a_side_of_half_the_row(monkeypatch: pytest.MonkeyPatch) -> None:
    # a row of 64: sides of (64 - 3 - 12) // 4 = 12 tokens, so 27 in all; a row of 1,000: sides of 24, 51 in all
    lines, calls = shown(monkeypatch, 64)(26, 27, 101)
    assert calls == [
        (f"{letters(0, 12)}[MASK]{letters(15, 27)}", {"max_tokens": 12}),
        (f"{letters(38, 50)}[MASK]{letters(53, 65)}", {"max_tokens": 12}),
    ]
    assert lines == [
        f"src (en) ...{calls[0][0]}...", "    filled 'f / g', was 'mno'",
        f"src (en) ...{calls[1][0]}...", "    filled 'f / g', was 'yza'",
    ]  # fmt: skip
    _, calls = shown(monkeypatch, 1000)(50, 51, 52)
    assert [prompt for prompt, _ in calls] == [
        f"{letters(0, 24)}[MASK]{letters(27, 51)}", f"{letters(1, 25)}[MASK]{letters(28, 52)}"
    ]  # fmt: skip


def test_as_many_examples_as_requested_and_one_that_does_not_fit_is_skipped(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    assert len(shown(monkeypatch, 64)(*[40] * 9)[0]) == 6  # three, of two lines each
    lines, calls = shown(monkeypatch, 64, refused=2, count=1)(*[40] * 9)
    assert len(lines) == 2 and len(calls) == 3
    assert shown(monkeypatch, 18)(200, 200) == ([], [])  # no room for a side of one token: 18 - 15 < 4
    assert len(shown(monkeypatch, 19)(200, 200)[0]) == 4


def test_a_top_p_of_1_keeps_all_even_where_one_token_has_almost_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jax.random, "categorical", lambda key, logits: jnp.isfinite(logits).sum())
    logits = jnp.array([90.0, 1.0, 0.0])  # in float32 the first has probability 1
    assert Sampling(1.0, top_p=1.0).choose(logits, jax.random.key(0)) == 3
    assert Sampling(1.0, top_p=0.99).choose(logits, jax.random.key(0)) == 1


LOGITS = np.array([2.0, 1.5, 1.0, 1.0, 0.3, -0.2, -1.0, -3.0, -np.inf], np.float32)


def allowed_by_hand(temperature: float, top_k: int, top_p: float) -> np.ndarray:
    """Return the probabilities of each token, worked out token by token: float64 [V]."""
    weights = {token: np.exp(float(LOGITS[token]) / temperature) for token in range(8)}
    if top_k:
        least = sorted(weights.values(), reverse=True)[:top_k][-1]
        weights = {token: weight for token, weight in weights.items() if weight >= least}
    kept, mass, total = {}, 0.0, sum(weights.values())
    for token, weight in sorted(weights.items(), key=lambda pair: -pair[1]):
        if kept and mass >= top_p * total and weight < min(kept.values()):  # equal ones stay together
            break
        kept[token], mass = weight, mass + weight
    return np.array([kept.get(token, 0.0) for token in range(9)]) / sum(kept.values())


# 99.9% points of chi-square by degrees of freedom
POINTS = {0: 0.0, 1: 10.83, 2: 13.82, 3: 16.27, 4: 18.47, 5: 20.52, 6: 22.46, 7: 24.32}


@pytest.mark.parametrize(
    "temperature, top_k, top_p, kept",
    [
        (1.0, 0, 1.0, 8), (0.5, 0, 1.0, 8), (3.0, 0, 1.0, 8), (1.0, 1, 1.0, 1), (1.0, 2, 1.0, 2), (0.7, 3, 1.0, 4),
        (1.0, 5, 1.0, 5), (1.0, 50, 1.0, 8), (1.0, 0, 0.5, 2), (1.0, 0, 0.9, 5), (2.0, 0, 0.3, 2), (1.0, 5, 0.6, 2),
        (0.5, 5, 0.75, 2), (1.0, 0, 0.0, 1),
    ],
)  # fmt: skip
def test_tokens_come_as_often_as_their_probability_says(
    temperature: float, top_k: int, top_p: float, kept: int
) -> None:
    """Chi-square over 8,000 draws at 99.9%: 14 cases fail by chance for one set of keys in 70; the keys are fixed."""
    expected = allowed_by_hand(temperature, top_k, top_p)
    assert np.count_nonzero(expected) == kept
    sampling = Sampling(temperature, top_k, top_p)
    keys = jax.random.split(jax.random.key(11), 8000)
    drawn = np.asarray(jax.vmap(lambda key: sampling.choose(jnp.asarray(LOGITS), key))(keys))
    counts = np.bincount(drawn, minlength=9)
    likely = expected > 0
    assert drawn.dtype == np.int32 and counts[~likely].sum() == 0
    chi_square = ((counts - 8000 * expected)[likely] ** 2 / (8000 * expected[likely])).sum()
    assert chi_square <= POINTS[kept - 1]
