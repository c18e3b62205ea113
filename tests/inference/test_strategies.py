"""Options are checked; filters, constraints and draws are as documented, for each row of a batch by itself."""

import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.engine.strategy import Strategy
from glm_jax.errors import UserError
from glm_jax.inference import beams, constraints, sampling
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.sampling import Sampler, Search, Settings
from glm_jax.inference.strategies import Beam, Greedy, Options, Request, Sample, named

GOLDENS = Path(__file__).parent.parent / "goldens/glm130b_inference"
END = 5
TINY = Vocabulary(width=8, size=7, ends=(END,), banned=(6,))  # 7 is padding
choose = jax.jit(Sampler().choose)
filtered = jax.jit(
    lambda logits, temperature, top_k, top_p: sampling.filtered(sampling.scaled(logits, temperature), top_k, top_p)
)


def keys(seed: int, number: int) -> np.ndarray:
    return np.asarray(jax.random.key_data(jax.random.split(jax.random.key(seed), number)))


def begin(options: list[Options], limit: int = 4, seed: int = 0) -> tuple[Settings[np.ndarray], Search[np.ndarray]]:
    requests = [Request([0], limit, one, key) for one, key in zip(options, keys(seed, len(options)), strict=True)]
    return sampling.begin(requests, TINY, room=4)


NUMBER = 400  # of draws; one shape compiles once


def drawn(options: Options, logits: list[float]) -> np.ndarray:
    """Draw the first token many times: int32 [NUMBER]."""
    settings, search = begin([options] * NUMBER)
    whole = np.full((NUMBER, TINY.width), -1e30, np.float32)
    whole[:, : len(logits)] = logits
    choice, _ = choose(whole, settings, search)
    return np.asarray(choice.tokens)


# Options


def test_named_strategies() -> None:
    assert named("greedy") == Greedy()
    assert named("sample", temperature=0.5, top_k=3) == Sample(temperature=0.5, top_k=3)
    assert named("beam", count=2, bias=[[3, 1]], banned=[4]) == Beam(count=2, bias=((3, 1.0),), banned=(4,))
    assert named("sample", top_p=np.float32(0.5), top_k=np.int64(2)) == Sample(top_p=0.5, top_k=2)
    assert len({Greedy(), Greedy(), Sample(), Beam()}) == 3


@pytest.mark.parametrize(
    "name, options, message",
    [
        ("bean", {}, "unknown strategy 'bean': choose one of greedy, sample, beam"),
        ("sample", {"temprature": 1.0}, "strategy sample has no option temprature: did you mean temperature?"),
        ("greedy", {"top_k": 1}, "strategy greedy has no option top_k: it is one of sample"),
        ("beam", {"zzz": 1}, "strategy beam has no option zzz: `glm-jax generate --help` lists all of them"),
        ("sample", {"temperature": np.nan}, "temperature is nan, it must be a finite number"),
        ("sample", {"temperature": -0.5}, "temperature is -0.5, it must not be negative"),
        ("sample", {"temperature": "hot"}, "temperature is 'hot', it must be of type float (such as 1.0)"),
        ("sample", {"top_k": 2.0}, "top_k is 2.0, it must be of type int (such as 0)"),
        ("sample", {"top_k": True}, "top_k is True, it must be of type int (such as 0)"),
        ("sample", {"top_p": 1.5}, "top_p is 1.5, it must be from 0 to 1"),
        ("greedy", {"min_tokens": -1}, "min_tokens is -1, it must not be negative"),
        ("greedy", {"repetition_penalty": 0.0}, "repetition_penalty is 0.0, it must be from 0.01 to 100"),
        ("greedy", {"bias": ((3, np.inf),)}, "bias holds inf, it must be a finite number"),
        ("greedy", {"bias": (3,)}, "bias holds 3: its entries are pairs such as (17, -2.5)"),
        ("greedy", {"banned": (-3,)}, "banned holds -3, it must not be negative"),
        ("greedy", {"banned": ("a",)}, "banned is 'a', it must be of type int (such as (17,))"),
        ("beam", {"count": 0}, "count is 0, it must be from 1 to 256"),
        ("beam", {"length_penalty": np.inf}, "length_penalty is inf, it must be a finite number"),
        ("beam", {"deterministic": 1}, "deterministic is 1, it must be of type bool (such as True)"),
    ],
)
def test_options_that_are_not_allowed(name: str, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{re.escape(message)}$"):
        named(name, **options)


@pytest.mark.parametrize(
    "options, message",
    [
        (Greedy(banned=(7,)), "banned names token 7: the vocabulary has 0 to 6"),
        (Greedy(bias=((-1, 1.0),)), "bias names token -1: the vocabulary has 0 to 6"),
        (Greedy(banned=(0, 1, 2, 3, 4)), "banned leaves no token to generate: ban fewer"),
    ],
)
def test_options_that_the_vocabulary_does_not_allow(options: Options, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}$"):
        begin([options])


def test_requests_that_are_for_something_else() -> None:
    with pytest.raises(ValueError, match="^rows are sampled with Greedy or Sample options$"):
        begin([Greedy(), Beam()])
    with pytest.raises(ValueError, match="^a limit is above the room for 4 tokens$"):
        begin([Greedy()], limit=5)


# Filters


def test_filters_of_the_released_code() -> None:
    with np.load(GOLDENS / "filter.npz") as arrays:
        golden = dict(arrays)
    temperature, top_k, top_p = golden["settings"].T
    top_p = np.where(top_p == 0, 1, top_p)  # there, 0 keeps all
    top_k = top_k.astype(np.int32)
    for name in ("random", "flat", "peaked", "small", "ties"):
        logits, probabilities = golden[f"{name}/logits"], golden[f"{name}/probs"]
        kept = filtered(np.tile(logits, (len(top_k), 1)), temperature, top_k, top_p)
        np.testing.assert_allclose(jax.nn.softmax(kept), probabilities, rtol=0, atol=1e-6)
    banned = golden["random/logits"].copy()
    banned[golden["invalid/banned"]] = -np.inf
    rest = np.array([0.7], np.float32), np.array([5]), np.array([0.5], np.float32)
    np.testing.assert_allclose(jax.nn.softmax(filtered(banned[None], *rest))[0], golden["invalid/probs"], atol=1e-6)


def test_filters_against_loops() -> None:
    """Random rows with ties; top-k, then top-p in the order of probability and, among equals, of the vocabulary."""
    rng, number = np.random.default_rng(3), 64
    logits = rng.integers(-3, 4, (number, 12)).astype(np.float32)
    logits[rng.random(logits.shape) < 0.2] = -np.inf
    logits[:, 0] = 0.0
    temperature = rng.choice([0.5, 1.0, 3.0], number).astype(np.float32)
    top_k, top_p = (
        rng.integers(0, 15, number).astype(np.int32),
        rng.choice([0.0, 0.31, 0.77, 1.0], number).astype(np.float32),
    )
    found = np.isfinite(filtered(logits, temperature, top_k, top_p))
    for row in range(number):
        values = logits[row] / temperature[row]
        if top_k[row] and top_k[row] <= 12:
            values = np.where(values >= np.sort(values)[-top_k[row]], values, -np.inf)
        shares = np.exp(np.float64(values)) / np.exp(np.float64(values)).sum()
        kept, mass = np.zeros(12, bool), 0.0
        for token in sorted(range(12), key=lambda token: (-values[token], token)):
            kept[token] = shares[token] > 0 and (top_p[row] == 1 or mass <= top_p[row])
            mass += shares[token]
        assert found[row].tolist() == kept.tolist()
    assert len(set(found.sum(1).tolist())) > 1


def test_the_edges_of_top_p() -> None:
    one, none = np.ones(64, np.float32), np.zeros(64, np.int32)
    logits = np.random.default_rng(0).normal(0, 5, (64, 64)).astype(np.float32)  # some sums are above 1 before the tail
    assert np.isfinite(filtered(logits, one, none, one)).all()
    reached = filtered(np.zeros((1, 4), np.float32), one[:1], none[:1], one[:1] / 2)  # 0.25 + 0.25 before the third
    assert np.isfinite(reached).tolist() == [[True, True, True, False]]


def test_sampling_keeps_what_top_k_and_top_p_allow() -> None:
    logits = np.log([0.4, 0.3, 0.2, 0.1]).tolist()

    def chosen(options: Options) -> set[int]:
        return set(drawn(options, logits).tolist())

    assert chosen(Greedy()) == {0}
    assert chosen(Sample()) == {0, 1, 2, 3}
    assert chosen(Sample(top_k=2)) == {0, 1}
    assert chosen(Sample(top_k=2**31 - 1)) == {0, 1, 2, 3}
    assert chosen(Sample(top_p=0.65)) == {0, 1}  # 0.4 is too little, with 0.3 it is enough
    assert chosen(Sample(top_p=0.0)) == {0}
    assert chosen(Sample(top_k=3, top_p=0.4)) == {0}  # 0.4 of 0.9 is enough alone


@pytest.mark.parametrize("temperature", [0.0, 5e-324, 1e-45, 1e-40, 1.2e-38, 1e-38, 1e-30, 1e-10, 1e-4])
@pytest.mark.parametrize("top_k, top_p", [(0, 1.0), (3, 1.0), (0, 0.5), (0, 1e-45)])
def test_small_temperatures_are_greedy(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.array([-3.0, 8.25, -1e38, 8.0, -1e30, 0.0, 9.0, 99.0])  # no fill may have the last two
    for shift in (0, 1e4):
        assert set(drawn(Sample(temperature=temperature, top_k=top_k, top_p=top_p), (logits - shift).tolist())) == {1}


@pytest.mark.parametrize("temperature", [1e10, 3e38, 1e39, 1e308])
def test_large_temperatures_are_uniform_and_never_choose_what_is_banned(temperature: float) -> None:
    options = Sample(temperature=temperature, banned=(2,))
    tokens = drawn(options, [-3.0, 8.0, 99.0, 0.0, 1.0, 50.0, 60.0, 70.0])
    shares = np.bincount(tokens, minlength=8) / NUMBER
    assert set(tokens.tolist()) == {0, 1, 3, 4}  # 5 ends a fill
    assert (np.abs(shares[[0, 1, 3, 4]] - 0.25) < 4 * np.sqrt(0.25 * 0.75 / NUMBER)).all()


def test_a_row_draws_from_its_own_distribution_wherever_it_is() -> None:
    """Rows of four settings, mixed: each row's tokens have its setting's shares, and are those it draws alone."""
    logits = np.array([1.0, 0.5, 0.0, -0.5, -1.0, 0.3, 9.0, 9.0], np.float32)
    number = 4000
    kinds: list[Options] = [
        Sample(temperature=0.7, min_tokens=0),
        Sample(temperature=2.0, top_k=3),
        Sample(top_p=0.6, bias=((4, 2.0),)),
        Greedy(banned=(0,)),
    ]
    settings, search = begin(kinds * (number // 4), seed=5)
    many = np.tile(logits, (number, 1))
    many[3::4, 2] = 0.5  # as likely as token 1, and behind it
    choice, first = choose(many, settings, search)
    _, second = choose(many, settings, first)
    tokens = np.asarray(second.tokens)[:, :2]
    np.testing.assert_array_equal(tokens[:, 0], choice.tokens)
    assert set(tokens[3::4].ravel()) == {1}
    for kind, options in enumerate(kinds[:3]):
        values = logits.astype(np.float64)
        values[[6, 7, *options.banned] + ([END] if options.min_tokens else [])] = -np.inf
        for token, added in options.bias:
            values[token] += added
        one, _ = begin([options])
        values = np.asarray(filtered(values[None].astype(np.float32), one.temperature, one.top_k, one.top_p))[0]
        shares = np.exp(values) / np.exp(values).sum()
        counts = np.bincount(tokens[kind::4, 0], minlength=8)
        assert (counts[shares == 0] == 0).all()
        expected = shares[shares > 0] * number / 4
        assert ((counts[shares > 0] - expected) ** 2 / expected).sum() < 25  # chi-square of at most 5: p < 2e-4
    # the second token is drawn anew
    assert (tokens[0::4, 0] != tokens[0::4, 1]).mean() > 0.5
    order = np.random.default_rng(0).permutation(number)
    shuffled, _ = choose(many[order], *jax.tree.map(lambda array: array[order], (settings, search)))
    np.testing.assert_array_equal(shuffled.tokens, np.asarray(choice.tokens)[order])


# Constraints and the search of a row


def test_the_repetition_penalty_makes_seen_tokens_less_likely() -> None:
    options = Sample(repetition_penalty=2.0, bias=((2, 0.25),), min_tokens=2)
    rules = constraints.build([Request([1, 3, END], 9, options)], TINY, room=9)
    row = jax.tree.map(lambda array: jnp.asarray(array[0]), rules)
    logits = jnp.array([4.0, 4.0, -4.0, -4.0, 1.0, 3.0, 0.0, jnp.nan])
    tokens = jnp.array([2, 0, 0, 0])
    one = constraints.constrained(logits, row, tokens, jnp.int32(1))
    np.testing.assert_allclose(one, [4, 2, -7.75, -8, 1, -np.inf, -np.inf, -np.inf])
    # from two tokens on the end is allowed; the end token in the context has not been seen
    two = constraints.constrained(logits, row, tokens, jnp.int32(2))
    np.testing.assert_allclose(two, [2, 2, -7.75, -8, 1, 3, -np.inf, -np.inf])


def test_a_row_ends_with_an_end_token_at_its_limit_or_where_logits_are_not_finite() -> None:
    wants_end = np.array([0, 1, 2, 3, 4, 9, 99, np.nan], np.float32)  # 6 is banned, 7 no token
    options: list[Options] = [Greedy(), Greedy(min_tokens=0), Greedy(min_tokens=9), Greedy(), Greedy(), Greedy()]
    requests = [Request([0], limit, one) for limit, one in zip((4, 4, 2, 4, 4, 0), options, strict=True)]
    settings, search = sampling.begin(requests, TINY, room=4)
    assert search.done.tolist() == [False] * 5 + [True]
    done = []
    for step in range(3):
        logits = np.tile(wants_end, (6, 1))
        logits[1] += 0 if step == 0 else np.nan  # done by then
        logits[3, 2] = np.inf if step == 0 else 0.0
        logits[4, 6] = -np.inf if step == 1 else 0.0  # banned, but the model's own
        choice, search = choose(logits, settings, search)
        assert choice.parents is None
        done.append(np.asarray(choice.done).tolist())
    assert done == [
        [False, True, False, True, False, True],
        [True, True, True, True, True, True],
        [True] * 6,
    ]
    assert np.asarray(search.finite).tolist() == [True, True, True, False, False, True]
    found = sampling.finish(settings, search)
    assert [one.tokens for one in found] == [[4, END], [END], [4, 4], [], [4], []]
    assert [one.ended for one in found] == [True, True, False, False, False, False]
    total = np.log(np.exp(wants_end[:7].astype(np.float64)).sum())
    np.testing.assert_allclose(found[0].log_probabilities, [4 - total, 9 - total], rtol=1e-6)
    assert found[0].score == pytest.approx(sum(found[0].log_probabilities))


def test_the_model_s_log_probabilities_know_nothing_of_options() -> None:
    options = Sample(temperature=9.0, top_k=1, bias=((1, 5.0),), banned=(0,), repetition_penalty=3.0)
    logits = np.array([3.0, 1.0, 0.5, 0.0, -1.0, 2.0, 1.5, 8.0], np.float32)
    settings, search = begin([options] * 6)
    _, search = choose(np.tile(logits, (6, 1)), settings, search)
    found = sampling.finish(settings, search)[0]
    expected = 1.0 - np.log(np.exp(logits[:7].astype(np.float64)).sum())
    assert found.tokens == [1] and found.log_probabilities == pytest.approx([expected])


def test_another_number_compiles_nothing() -> None:
    traces = 0

    @jax.jit
    def counted(logits: jax.Array, settings: Any, search: Any) -> Any:
        nonlocal traces
        traces += 1
        return Sampler().choose(logits, settings, search)

    logits = np.zeros((6, TINY.width), np.float32)
    for options in (Greedy(), Sample(temperature=0.3, top_k=4), Sample(top_p=0.2, repetition_penalty=1.5, banned=(1,))):
        counted(logits, *begin([options, Greedy()] * 3, limit=3, seed=8))
    assert traces == 1


@pytest.mark.parametrize("kind", ["sampler", "beams"])
def test_strategies_run_in_a_loop_in_a_shard_map(kind: str) -> None:
    """What is alike on all devices and what is not fit together: the types of the loop's state hold."""
    mesh = jax.make_mesh((1,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    strategy: Strategy
    if kind == "beams":
        requests = [Request([0, 1], 3, Beam(count=2, no_repeat_ngram=2, deterministic=False))] * 2
        strategy, *state = beams.begin(requests, TINY, room=4)
    else:
        strategy, state = Sampler(), begin([Greedy(), Sample(), Sample(top_k=2), Greedy()], limit=3)

    def local(logits: Any, settings: Any, search: Any) -> Any:
        def step(search: Any) -> Any:
            return strategy.choose(logits, settings, search)[1]

        return jax.lax.while_loop(lambda search: ~search.done.all(), step, search)

    rows = jax.P("data")
    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(rows, rows, rows), out_specs=rows))
    logits = np.tile(np.arange(TINY.width, dtype=np.float32), (4, 1))
    assert np.asarray(run(logits, *state).done).all()
