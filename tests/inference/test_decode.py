"""Decoding with the cache equals computing the whole row again for every token; strategies choose as documented."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from glm_jax.inference.decode import NotFinite, generate, row_positions

from glm_jax.inference import decode
from glm_jax.inference.strategies import GREEDY, Sampling
from glm_jax.model import GLMConfig, apply, init

CONFIG = GLMConfig(num_layers=2, hidden_size=32, num_heads=4, ffn_size=48, vocab_size=64, max_length=128)
SOP, EOP, MASK = 61, 62, 63


def recomputed(cfg: GLMConfig, params: dict, context: list[int], blank: int, repeats: bool, count: int) -> list[int]:
    """Generate greedily: compute the whole row for every token, with its mask and positions written out."""
    size = len(context)
    length = size + 1 + count
    tokens = np.array([*context, SOP] + [0] * count)
    first = [*range(size), *([blank] * (count + 1) if repeats or cfg.position == "learned_2d" else range(size, length))]
    second = [0] * size + list(range(1, count + 2))
    positions = jnp.array([[first, second] if cfg.position == "learned_2d" else first])
    allowed = np.tril(np.ones((1, length, length), bool))
    allowed[:, :, :size] = True
    whole = jax.jit(apply, static_argnums=0)
    for place in range(size, length - 1):
        logits = np.array(whole(cfg, params, jnp.array([tokens]), positions, jnp.asarray(allowed))[0, place])
        logits[[MASK, SOP] + ([EOP] if place == size else [])] = -np.inf
        tokens[place + 1] = logits.argmax()
        if tokens[place + 1] == EOP:
            return tokens[size + 1 : place + 1].tolist()
    return tokens[size + 1 :].tolist()


@pytest.mark.parametrize(
    "position",
    ["rope", *(pytest.param(name, marks=[pytest.mark.slow, pytest.mark.oldest]) for name in ("learned_2d", "alibi"))],
)
@pytest.mark.parametrize("repeats", [True, False])
def test_cached_greedy_decoding_equals_recomputation(position: str, repeats: bool) -> None:
    cfg = dataclasses.replace(CONFIG, position=position)
    params = jax.tree.map(lambda array: array * 3, init(cfg, jax.random.key(3)))
    context = [5, 9, MASK, 11, 3]
    banned = np.isin(np.arange(64), [MASK, SOP])
    settings = {"sop": SOP, "repeats": repeats, "ends": [EOP], "banned": banned, "budget": 12}
    generated = generate(cfg, params, context, 2, **settings, sampling=GREEDY, key=jax.random.key(0))
    assert generated == recomputed(cfg, params, context, 2, repeats, 12)
    assert len(set(generated)) > 1


def test_positions_of_a_blank() -> None:
    np.testing.assert_array_equal(row_positions(CONFIG, 7, 4, 1, True), [[0, 1, 2, 3, 1, 1, 1]])
    np.testing.assert_array_equal(row_positions(CONFIG, 7, 4, 1, False), [[0, 1, 2, 3, 4, 5, 6]])
    two_streams = dataclasses.replace(CONFIG, position="learned_2d")
    expected = [[[0, 1, 2, 3, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3]]]
    np.testing.assert_array_equal(row_positions(two_streams, 7, 4, 1, True), expected)


def chosen(sampling: Sampling, logits: jax.Array) -> set[int]:
    keys = jax.random.split(jax.random.key(0), 300)
    return set(np.asarray(jax.vmap(lambda key: sampling.choose(logits, key))(keys)).tolist())


def test_sampling_keeps_what_top_k_and_top_p_allow() -> None:
    logits = jnp.log(jnp.array([0.4, 0.3, 0.2, 0.1, 0.0]))
    assert chosen(GREEDY, logits) == {0}
    assert chosen(Sampling(temperature=1.0), logits) == {0, 1, 2, 3}
    assert chosen(Sampling(temperature=1.0, top_k=2), logits) == {0, 1}
    assert chosen(Sampling(temperature=1.0, top_p=0.65), logits) == {0, 1}  # 0.4 is too little, with 0.3 it is enough
    assert chosen(Sampling(temperature=1.0, top_p=0.0), logits) == {0}
    assert chosen(Sampling(temperature=1.0, top_k=3, top_p=0.4), logits) == {0}  # 0.4 of 0.9 is enough alone


def test_temperature_flattens() -> None:
    logits = jnp.array([2.0, 0.0])
    keys = jax.random.split(jax.random.key(0), 2000)
    shares = [float((jax.vmap(lambda key, t=t: Sampling(t).choose(logits, key))(keys) == 0).mean()) for t in (1.0, 4.0)]
    assert shares == pytest.approx([1 / (1 + np.exp(-2.0)), 1 / (1 + np.exp(-0.5))], abs=0.04)


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-40, 1.2e-38, 1e-38, 1e-30, 1e-10, 1e-4])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.5), (0, 1e-45)])
def test_small_temperatures_are_greedy(temperature: float, top_k: int, top_p: float) -> None:
    logits = jnp.array([-3.0, 8.25, -jnp.inf, 8.0, -1e30, 0.0])
    assert chosen(Sampling(temperature, top_k, top_p), logits) == {1}
    assert chosen(Sampling(temperature, top_k, top_p), logits - 1e4) == {1}


@pytest.mark.parametrize("temperature", [1e10, 3e38, 1e39, 1e308])
def test_large_temperatures_are_uniform_and_never_choose_what_is_banned(temperature: float) -> None:
    assert chosen(Sampling(temperature), jnp.array([-3.0, 8.0, -jnp.inf, 0.0])) == {0, 1, 3}


@pytest.mark.parametrize("damage", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("token", [5, 40])  # in the context, and not in it
def test_logits_of_damaged_params_are_refused(damage: float, token: int) -> None:
    params = init(CONFIG, jax.random.key(3))
    word = params["embedding"]["word"]
    params["embedding"]["word"] = word.at[token, 0].set(damage)  # the head is tied: the logit of `token`, everywhere
    settings = {"sop": SOP, "repeats": True, "ends": [EOP], "banned": np.isin(np.arange(64), [MASK, SOP]), "budget": 12}
    with pytest.raises(NotFinite, match="^the model's logits are not finite: "):
        generate(CONFIG, params, [5, 9, MASK, 11, 3], 2, **settings, sampling=GREEDY, key=jax.random.key(0))


@pytest.mark.parametrize("place", [0, 9])  # of the prefill, and of the fourth token
def test_one_place_without_finite_logits_is_enough(place: int, monkeypatch: pytest.MonkeyPatch) -> None:
    def apply_cached(*arguments: Any) -> tuple[jax.Array, Any]:
        logits, cache = decode_apply_cached(*arguments)
        return jnp.where(arguments[-1] == place, jnp.nan, logits), cache

    decode_apply_cached = decode.apply_cached
    monkeypatch.setattr(decode, "apply_cached", apply_cached)
    cfg = dataclasses.replace(CONFIG, max_length=129 + place)  # so that nothing compiled is used again
    params, banned = init(cfg, jax.random.key(3)), np.isin(np.arange(64), [MASK, SOP, EOP])
    settings = {"sop": SOP, "repeats": True, "ends": [EOP], "banned": banned, "sampling": GREEDY}
    with pytest.raises(NotFinite):
        generate(cfg, params, [5, 9, MASK, 11, 3], 2, **settings, budget=12, key=jax.random.key(0))
    if place:
        short = generate(cfg, params, [5, 9, MASK, 11, 3], 2, **settings, budget=3, key=jax.random.key(0))
        assert len(short) == 3
