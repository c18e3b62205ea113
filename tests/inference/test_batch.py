"""Decoding in batches equals computing every row alone and whole, and compiles a handful of programs."""

import dataclasses
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.engine import decode
from glm_jax.inference import batch
from glm_jax.inference.batch import Decoder, Generation, Job, NotFinite, batch_limit, bucket, row_positions
from glm_jax.inference.prompts import Context
from glm_jax.inference.scoring import score
from glm_jax.inference.strategies import Beam, Generated, Greedy, Options, Request, Sample
from tests.inference import tiny
from tests.inference.tiny import CONFIG, EOP, MASK, SOP, VOCABULARY, job, recomputed

CLOSE = 5e-4  # nats; the tiny model amplifies the noise of float32, tests/model/test_cached.py has the logits
SAMPLED = Sample(temperature=1.5, top_k=20, top_p=0.9, repetition_penalty=1.3)


def generated(decoder: Decoder, jobs: list[Job], *turns: int) -> list[list[Generated]]:
    generation = Generation(decoder, jobs, VOCABULARY)
    for count in turns or (100,):
        generation.advance(count)
    assert generation.done().all()
    return generation.results()


def same(found: list[Generated], expected: list[Generated]) -> None:
    assert [one.tokens for one in found] == [one.tokens for one in expected]
    for one, other in zip(found, expected, strict=True):
        assert one.ended == other.ended
        np.testing.assert_allclose(one.log_probabilities, other.log_probabilities, atol=CLOSE)
        assert one.score == pytest.approx(other.score, abs=2e-3)


@pytest.mark.parametrize(
    "options", [Greedy(), SAMPLED, Beam(count=3, no_repeat_ngram=2)], ids=["greedy", "sample", "beam"]
)
def test_a_batch_equals_each_row_computed_whole(options: Options) -> None:
    jobs = [job(number, limit=4 + number, options=options) for number in range(4)]
    for found, one in zip(generated(tiny.decoder(CONFIG), jobs, 1, 3, 8), jobs, strict=True):
        same(found, recomputed(CONFIG, one))
    if options is SAMPLED:
        assert len({tuple(found[0].tokens[:4]) for found in generated(tiny.decoder(CONFIG), jobs)}) == 4


@pytest.mark.slow
@pytest.mark.parametrize("change", [{"position": "alibi"}, {"position": "learned_2d", "norm": "pre"},
                                    {"norm": "post"}, {"norm": "sandwich"}], ids=str)  # fmt: skip
def test_every_norm_and_position_decodes_as_whole_rows_do(change: Any) -> None:
    cfg = dataclasses.replace(CONFIG, **change)
    jobs = [job(0), job(1, options=SAMPLED), job(2), job(3)]
    for found, one in zip(generated(tiny.decoder(cfg), jobs), jobs, strict=True):
        same(found, recomputed(cfg, one))


def test_a_row_is_the_same_alone_among_others_and_in_any_order() -> None:
    decoder = tiny.decoder(CONFIG)
    jobs = [job(number, options=SAMPLED if number % 2 else Greedy()) for number in range(4)]
    together = generated(decoder, jobs)
    backwards = generated(decoder, jobs[::-1])[::-1]
    longer = job(9, limit=60)  # the next bucket
    for number, one in enumerate(jobs):
        for other in (generated(decoder, [one])[0], backwards[number], generated(decoder, [longer, one, longer])[1]):
            same(other, together[number])


@pytest.mark.slow
def test_rows_of_all_lengths_compile_a_handful_of_programs() -> None:
    decoder = tiny.decoder(dataclasses.replace(CONFIG, max_length=127))  # so that nothing is compiled yet
    before = decode.prefill._cache_size(), decode.decode._cache_size()  # pyright: ignore (jax has no public count)
    random = np.random.default_rng(0)
    for size in range(1, 90, 11):
        for rows in (1, 3):
            tokens = [MASK, *random.integers(1, 60, size).tolist(), SOP]
            request = Request(tokens, int(random.integers(1, 30)), Greedy())
            Generation(decoder, [Job(Context(tokens, 0, True), request)] * rows, VOCABULARY).advance(1)
    after = decode.prefill._cache_size(), decode.decode._cache_size()  # pyright: ignore
    # rows of 32, 64 and 128 places; contexts read in as many, or half as many; batches of 1 and of 4
    assert after[0] - before[0] <= 10 and after[1] - before[1] <= 6


def test_sizes_are_powers_of_two() -> None:
    assert [bucket(size) for size in (1, 32, 33, 64, 65, 1000)] == [32, 32, 64, 64, 128, 1024]


def test_a_batch_fits_beside_the_weights(monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = tiny.decoder(CONFIG)
    assert batch_limit(decoder) == 32 and batch_limit(decoder, 12) == 2 and batch_limit(decoder, 40) == 1
    weights = sum(array.nbytes for array in jax.tree.leaves(decoder.weights))
    row = 2 * 3 * 128 * 32 * 4  # keys and values of 3 layers, 128 tokens of 32 numbers
    for rows, expected in ((0, 1), (3, 1), (4, 4), (15, 4), (16, 16), (31, 16), (32, 32)):
        monkeypatch.setattr(batch, "device_memory", lambda rows=rows: weights + 2 * row * rows)
        assert batch_limit(decoder) == expected


def test_another_blank_of_the_same_context_equals_whole_rows() -> None:
    """Row 0 has 4 tokens in its first blank, row 1 has 1, and row 2 has no second blank."""
    decoder, limits, kept = tiny.decoder(CONFIG), (4, 4, 3), (4, 1, 3)
    first = [job(number, limit=limit) for number, limit in zip((1, 2, 4), limits, strict=True)]
    first = [one._replace(later=9) for one in first]
    generation = Generation(decoder, first, VOCABULARY)
    generation.advance(4)
    written = [found[0].tokens[:count] for found, count in zip(generation.results(), kept, strict=True)]
    seconds = []
    for one, tokens, limit in zip(first, written, (5, 3, 0), strict=True):
        context = one.context._replace(blank=0, earlier=((one.context.blank, 1 + len(tokens)),))
        seconds.append(Job(context, one.request._replace(limit=limit)))
    generation.follow(seconds, [tokens[-1] for tokens in written])
    generation.advance(9)
    found = [one.tokens for (one,) in generation.results()]
    assert [len(tokens) for tokens in found] == [5, 3, 0]
    for one, before, tokens in zip(first, written, found, strict=True):
        size, row = len(one.context.tokens) - 1, [*one.context.tokens, *before, SOP]
        for token in tokens:
            positions = [
                *range(size),
                *[one.context.blank] * (1 + len(before)),
                *[0] * (len(row) - size - 1 - len(before)),
            ]
            places = np.arange(len(row))
            allowed = (places[:, None] >= places) | (places < size)
            logits = np.array(
                tiny.whole(CONFIG, tiny.params(CONFIG), np.array([row]), np.array([positions]), allowed[None])
            )
            logits[0, -1, [SOP, MASK, tiny.GMASK, *([EOP] if len(row) == size + 2 + len(before) else [])]] = -np.inf
            assert token == logits[0, -1].argmax()
            row.append(token)


def test_positions_of_a_blank() -> None:
    repeats, counts = Context([5, MASK, 6, 7, SOP], 1, True), Context([5, 6, 7, 8, SOP], 1, False)
    np.testing.assert_array_equal(row_positions(CONFIG, repeats, 7), [0, 1, 2, 3, 1, 1, 1])
    np.testing.assert_array_equal(row_positions(CONFIG, counts, 7), [0, 1, 2, 3, 4, 5, 6])
    later = repeats._replace(blank=3, earlier=((1, 3), (2, 1)))  # after fills of two tokens and of none
    np.testing.assert_array_equal(row_positions(CONFIG, later, 10), [0, 1, 2, 3, 1, 1, 1, 2, 3, 3])
    two_streams = dataclasses.replace(CONFIG, position="learned_2d")
    np.testing.assert_array_equal(row_positions(two_streams, later, 10)[1], [0, 0, 0, 0, 1, 2, 3, 1, 1, 2])
    original = dataclasses.replace(CONFIG, position="learned_2d", max_length=4)
    expected = [[0, 1, 2, 3, 1, 1, 1], [0, 0, 0, 0, 1, 2, 3]]
    np.testing.assert_array_equal(row_positions(original, counts, 7), expected)
    assert row_positions(original, counts, 20).max() == 3  # padding stays inside the tables


def test_rows_can_be_stopped_early() -> None:
    decoder, jobs = tiny.decoder(CONFIG), [job(1), job(2)]
    whole = [found[0].tokens for found in generated(decoder, jobs)]
    assert all(len(tokens) == 9 for tokens in whole)
    generation = Generation(decoder, jobs, VOCABULARY)
    generation.advance(3)
    generation.stop(np.array([True, False]))
    assert generation.done().tolist() == [True, False]
    generation.advance(20)
    assert [found[0].tokens for found in generation.results()] == [whole[0][:3], whole[1]]


@pytest.mark.parametrize("damage", [np.nan, np.inf])
@pytest.mark.parametrize("options", [Greedy(), Beam(count=2)])
def test_logits_of_damaged_params_are_refused(damage: float, options: Options) -> None:
    decoder = tiny.decoder(CONFIG)
    word = decoder.weights.outer["embedding"]["word"]
    outer = {**decoder.weights.outer, "embedding": {"word": word.at[40, 0].set(damage)}}  # the logit of 40, everywhere
    broken = dataclasses.replace(decoder, weights=decoder.weights._replace(outer=outer), source="step 7 of runs/x")
    generation = Generation(broken, [job(number, options=options) for number in range(3)], VOCABULARY)
    with pytest.raises(NotFinite, match="^the logits are not finite with the weights of step 7 of runs/x: "):
        generation.advance(5)


def test_scores_are_those_of_whole_rows() -> None:
    decoder = tiny.decoder(CONFIG)
    targets = [[7, 8, 9], [5], [3, EOP], [4, 4, 4, 4, 4]]
    pairs = [(job(number).context, target) for number, target in enumerate(targets)]
    for (context, target), found in zip(pairs, score(decoder, pairs), strict=True):
        tokens = [*context.tokens, *target]
        size = len(context.tokens)
        places = np.arange(len(tokens))
        allowed = (places[:, None] >= places) | (places < size - 1)
        positions = row_positions(CONFIG, context, len(tokens))
        logits = tiny.whole(CONFIG, tiny.params(CONFIG), np.array([tokens]), positions[None], allowed[None])[0]
        expected = np.asarray(jax.nn.log_softmax(logits))[np.arange(size - 1, len(tokens) - 1), target].sum()
        assert found.tokens == len(target)
        assert found.log_probability == pytest.approx(float(expected), abs=2e-3)
