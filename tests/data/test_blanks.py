"""Samples with blanks: the facts about GLM, checked on random texts."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.config.data import BlankOptions
from glm_jax.data.rows import blanks
from glm_jax.data.rows.room import OVERFLOW, overflow_probability, span_distribution, text_length
from glm_jax.errors import UserError

SPECIAL: Any = SimpleNamespace(pad=0, eos=1, mask=2, gmask=3, smask=4, sop=5, eop=6, prefix=())
FIRST = 10  # the smallest id of an ordinary token
PLAIN = BlankOptions()

lengths = st.integers(1, 700)
seeds = st.integers(0, 2**32)
ratios = st.sampled_from([0.05, 0.15, 0.3, 0.5])


def text_of(length):
    """Return a text of distinct tokens, so that tokens show their places."""
    return np.arange(FIRST, FIRST + length, dtype=np.int32)


def generator(seed):
    return np.random.default_rng(seed)


def blocks_of(sample):
    """Split the target part into blocks at each sop: (inputs, targets, positions, block positions) of each."""
    heads = [i for i in range(sample.context, len(sample)) if sample.tokens[i] == SPECIAL.sop]
    assert heads[0] == sample.context
    return [
        tuple(array[start:stop].tolist() for array in sample[:4])
        for start, stop in zip(heads, [*heads[1:], len(sample)], strict=True)
    ]


def rebuild(sample, blank):
    """Put each target block back in place of the blank that its positions name, token by token."""
    filled = {positions[0]: targets[:-1] for _, targets, positions, _ in blocks_of(sample)}
    text = []
    for place, token in enumerate(sample.tokens[: sample.context].tolist()):
        text.extend(filled.pop(place) if token == blank else [token])
    assert not filled
    return text


def check_short_blanks(sample, text, blank):
    """Check all facts about [MASK] and [sMASK] samples."""
    context = sample.tokens[: sample.context]
    assert (sample.targets[: sample.context] == context).all()
    assert sample.positions[: sample.context].tolist() == list(range(sample.context))
    assert (sample.block_positions[: sample.context] == 0).all()
    blocks = blocks_of(sample)
    assert len(blocks) == (context == blank).sum()
    for read, predicted, positions, block_positions in blocks:
        assert read[1:] == predicted[:-1]
        assert predicted[-1] == SPECIAL.eop
        assert len(set(positions)) == 1 and context[positions[0]] == blank
        assert block_positions == list(range(1, len(read) + 1))
    assert rebuild(sample, blank) == text.tolist()
    assert len(sample) == len(text) + 2 * len(blocks)


@given(lengths, seeds, ratios)
def test_mask_sample(length, seed, ratio):
    text = text_of(length)
    sample = blanks.mask_sample(text, generator(seed), SPECIAL, BlankOptions(mask_ratio=ratio))
    check_short_blanks(sample, text, SPECIAL.mask)


@given(lengths, seeds, ratios)
def test_masked_tokens_reach_the_ratio_and_only_the_last_span_goes_beyond(length, seed, ratio):
    drawn = blanks.draw_lengths(length, generator(seed), BlankOptions(mask_ratio=ratio))
    least = max(1, int(ratio * length))
    assert least <= drawn.sum() < least + drawn[-1]
    assert drawn.min() >= 1 and drawn.max() <= min(39, max(1, length // 2))


@given(lengths, seeds, ratios)
def test_spans_never_touch(length, seed, ratio):
    source = generator(seed)
    drawn = blanks.draw_lengths(length, source, BlankOptions(mask_ratio=ratio))
    starts, placed = blanks.place_spans(drawn, length, source)
    assert sorted(placed) == sorted(drawn)
    assert starts[0] >= 0 and starts[-1] + placed[-1] <= length
    assert (starts[1:] > starts[:-1] + placed[:-1]).all()


def test_half_of_a_short_text_can_be_masked():
    """If the last span would leave too few tokens between the spans, it is cut."""
    options = BlankOptions(mask_ratio=0.5, mean_span=1.0)
    for seed in range(3000):
        drawn = blanks.draw_lengths(8, generator(seed), options)
        starts, placed = blanks.place_spans(drawn, 8, generator(seed))
        assert drawn.min() >= 1 and drawn.sum() >= 4 and starts[-1] + placed[-1] <= 8
        assert (starts[1:] > starts[:-1] + placed[:-1]).all()


@pytest.mark.parametrize(("length", "longest"), [(1, 1), (2, 1), (3, 1), (4, 2), (7, 3)])
def test_no_span_is_longer_than_half_a_short_text(length, longest):
    options = BlankOptions(mask_ratio=0.5, mean_span=3.0)
    drawn = [blanks.draw_lengths(length, generator(seed), options).max() for seed in range(200)]
    assert max(drawn) == longest


def test_every_place_is_masked_alike():
    """The first and last tokens are masked less often, because spans fit in the text whole; all others are alike."""
    source, hits = generator(0), np.zeros(60)
    for _ in range(4000):
        starts, placed = blanks.place_spans(blanks.draw_lengths(60, source, PLAIN), 60, source)
        for start, size in zip(starts, placed, strict=True):
            hits[start : start + size] += 1
    inner = hits[5:-5]
    assert inner.min() > 0.85 * inner.mean() and inner.max() < 1.15 * inner.mean()
    assert hits.max() < 1.15 * inner.mean() and hits.min() > 0


def test_span_lengths_are_a_truncated_poisson():
    expected = span_distribution(3.0, 39)
    assert expected @ np.arange(1, 40) == pytest.approx(3.157, abs=5e-4)
    source = generator(1)
    drawn = np.concatenate([blanks.draw_lengths(2000, source, PLAIN) for _ in range(1000)])
    counts = np.bincount(drawn, minlength=40)[1:]
    tail = expected * len(drawn) < 10
    observed = np.append(counts[~tail], counts[tail].sum())
    wanted = np.append(expected[~tail], expected[tail].sum()) * len(drawn)
    chi_square = ((observed - wanted) ** 2 / wanted).sum()
    # 99.9% point of chi-square with 11 degrees of freedom
    assert len(observed) == 12 and chi_square < 31.3


def test_target_blocks_come_in_random_order():
    sample = blanks.mask_sample(text_of(600), generator(2), SPECIAL, PLAIN)
    positions = [block[2][0] for block in blocks_of(sample)]
    assert positions != sorted(positions) and len(set(positions)) == len(positions)


@given(st.integers(16, 600), seeds)
def test_mask_samples_fit_the_room_they_were_planned_for(room, seed):
    length = text_length("mask", room, PLAIN)
    sample = blanks.mask_sample(text_of(length), generator(seed), SPECIAL, PLAIN, room)
    assert len(sample) <= room
    check_short_blanks(sample, text_of(length), SPECIAL.mask)


@pytest.mark.parametrize(("length", "room"), [(222, 252), (440, 486), (50, 58)])
def test_overflow_probability_agrees_with_draws(length, room):
    source = generator(3)
    draws = [length + 2 * len(blanks.draw_lengths(length, source, PLAIN)) > room for _ in range(4000)]
    expected = overflow_probability(length, room, PLAIN)
    assert 0.005 < expected < 0.6
    assert np.mean(draws) == pytest.approx(expected, abs=4 * np.sqrt(expected / 4000))


@pytest.mark.parametrize("room", [64, 256, 512, 2048])
def test_text_length_is_the_longest_that_seldom_overflows(room):
    length = text_length("mask", room, PLAIN)
    assert overflow_probability(length, room, PLAIN) <= OVERFLOW
    assert overflow_probability(length + 1, room, PLAIN) > OVERFLOW
    assert length > 0.8 * room


def test_a_text_that_cannot_fit_is_refused():
    with pytest.raises(ValueError, match="do not fit"):
        blanks.mask_sample(text_of(64), generator(0), SPECIAL, PLAIN, 64)


@given(lengths, seeds, st.booleans())
def test_gmask_sample(length, seed, eop):
    text, options = text_of(length), BlankOptions(gmask_eop=eop)
    sample = blanks.gmask_sample(text, generator(seed), SPECIAL, options)
    prefix = sample.context - 1
    target = text[prefix:].tolist()
    assert max(1, int(0.2 * length)) <= len(target) <= length
    assert sample.tokens.tolist() == [
        *text[:prefix], SPECIAL.gmask, SPECIAL.sop, *(target if eop else target[:-1])
    ]  # fmt: skip
    predicted = [*target, SPECIAL.eop] if eop else target
    assert sample.targets.tolist() == [*text[:prefix], SPECIAL.gmask, *predicted]
    assert sample.positions.tolist() == list(range(len(sample)))


def test_gmask_lengths_are_uniform():
    source = generator(4)
    drawn = [
        100 + 1 - blanks.gmask_sample(text_of(100), source, SPECIAL, PLAIN).context for _ in range(8100)
    ]  # 20..100
    counts = np.bincount(drawn, minlength=101)[20:]
    assert counts.sum() == 8100
    # 99.9% point of chi-square with 80 degrees of freedom
    assert ((counts - 100) ** 2 / 100).sum() < 124.8


@pytest.mark.parametrize("room", [64, 2048])
@pytest.mark.parametrize("eop", [True, False])
def test_gmask_fills_a_row_exactly(room, eop):
    options = BlankOptions(gmask_eop=eop)
    text = text_of(text_length("gmask", room, options))
    assert len(blanks.gmask_sample(text, generator(0), SPECIAL, options)) == room


@given(st.integers(2, 300), seeds)
def test_gmask_infill_leaves_context_on_both_sides(length, seed):
    text, options = text_of(length), BlankOptions(gmask_infill_prob=1.0, two_streams=True)
    sample = blanks.gmask_sample(text, generator(seed), SPECIAL, options)
    check_short_blanks(sample, text, SPECIAL.gmask)
    text[0] = SPECIAL.eos  # two documents, so the blank must stay at the end
    sample = blanks.gmask_sample(text, generator(seed), SPECIAL, options)
    assert sample.tokens[sample.context - 1] == SPECIAL.gmask


def test_gmask_infill_reaches_every_place():
    options = BlankOptions(gmask_infill_prob=0.5)
    source = generator(5)
    places = [
        int(np.argmax(sample.tokens == SPECIAL.gmask)) < sample.context - 1
        for sample in (blanks.gmask_sample(text_of(100), source, SPECIAL, options) for _ in range(400))
    ]
    assert 0.35 < np.mean(places) < 0.6


@given(st.integers(2, 300), seeds)
def test_an_infill_ends_in_eop_and_a_suffix_of_the_original_does_not(length, seed):
    """The original code adds eop to a [gMASK] target that text may follow, and none to one at the end."""
    text, options = text_of(length), BlankOptions(gmask_infill_prob=0.5, gmask_eop=False)
    sample = blanks.gmask_sample(text, generator(seed), SPECIAL, options)
    ends = sample.targets[-1] == SPECIAL.eop
    inside = sample.tokens[sample.context - 1] != SPECIAL.gmask
    assert ends or not inside
    assert len(sample) == length + 1 + ends <= length + 2
    assert len(blanks.gmask_sample(text, generator(seed), SPECIAL, BlankOptions(gmask_eop=False))) == length + 1
    text[0] = SPECIAL.eos  # two documents, so the blank must stay at the end
    assert blanks.gmask_sample(text, generator(seed), SPECIAL, options).targets[-1] != SPECIAL.eop


def test_half_of_the_originals_gmask_targets_end_in_eop():
    options, source = BlankOptions(gmask_infill_prob=0.5, gmask_eop=False), generator(6)
    ends = [blanks.gmask_sample(text_of(100), source, SPECIAL, options).targets[-1] == SPECIAL.eop for _ in range(400)]
    assert 0.4 < np.mean(ends) < 0.6  # four deviations


@pytest.mark.parametrize("room", [64, 512])
def test_a_row_has_room_for_the_eop_of_an_infill(room):
    options = BlankOptions(gmask_infill_prob=1.0, gmask_eop=False)
    text = text_of(text_length("gmask", room, options))
    assert len(blanks.gmask_sample(text, generator(0), SPECIAL, options)) == room


@given(lengths, seeds, st.integers(1, 40))
def test_smask_sample(length, seed, every):
    text = text_of(length)
    ends = np.zeros(FIRST + length, bool)
    ends[FIRST + every - 1 :: every] = True
    sample = blanks.smask_sample(text, generator(seed), SPECIAL, PLAIN, ends)
    check_short_blanks(sample, text, SPECIAL.smask)
    for _, predicted, _, _ in blocks_of(sample):
        first, last = predicted[0] - FIRST, predicted[-2] - FIRST
        assert first % every == 0 and (last % every == every - 1 or last == length - 1)
    masked = [len(predicted) - 1 for _, predicted, _, _ in blocks_of(sample)]
    assert sum(masked) >= 0.15 * length > sum(masked[:-1])


def test_smask_stays_in_its_room():
    ends = np.ones(2000, bool)  # every token a sentence
    sample = blanks.smask_sample(text_of(200), generator(0), SPECIAL, PLAIN, ends, 240)
    assert len(sample) == 240
    check_short_blanks(sample, text_of(200), SPECIAL.smask)


def test_a_document_ends_a_sentence():
    text = text_of(20)
    text[9] = SPECIAL.eos
    text[4], text[14] = SPECIAL.eos - 1, SPECIAL.eos + 1  # these do not
    for seed in range(20):
        sample = blanks.smask_sample(text, generator(seed), SPECIAL, PLAIN, np.zeros(100, bool))
        assert [len(predicted) for _, predicted, _, _ in blocks_of(sample)] == [11]


def test_sentence_ends_in_both_languages():
    ends = blanks.find_sentence_ends(["a", "▁b.", "。", "！”", ",", "，", "\n", "…", "："])
    assert ends.tolist() == [False, True, True, True, False, False, True, True, True]


def test_end_of_document_is_ordinary_text():
    text = np.full(300, SPECIAL.eos, np.int32)
    sample = blanks.mask_sample(text, generator(0), SPECIAL, PLAIN)
    check_short_blanks(sample, text, SPECIAL.mask)


@given(st.integers(1, 600), seeds)
def test_two_streams_repeat_the_blanks_position(length, seed):
    options = BlankOptions(two_streams=True)
    for objective, blank in (("mask", SPECIAL.mask), ("gmask", SPECIAL.gmask)):
        samples = blanks.make_samples(objective, text_of(length), generator(seed), SPECIAL, options, 10_000)
        check_short_blanks(samples[0], text_of(length), blank)


def test_block_masking_hides_some_inputs_and_nothing_else():
    text, token = text_of(2000), 7
    options = BlankOptions(block_mask_prob=0.1, block_mask_token=token)
    sample = blanks.mask_sample(text, generator(0), SPECIAL, options)
    hidden = sample.tokens == token
    spans = sample.block_positions > 1
    assert not hidden[~spans].any()
    assert 0.05 < hidden[spans].mean() < 0.15
    assert not (sample.targets == token).any()
    assert (sample.tokens[1:][~hidden[1:] & spans[1:]] == sample.targets[:-1][~hidden[1:] & spans[1:]]).all()


def test_single_spans():
    source, options = generator(6), BlankOptions(single_span_prob=0.5)
    spans = [len(blanks.draw_lengths(500, source, options)) for _ in range(400)]
    assert 0.4 < np.mean(np.array(spans) == 1) < 0.6


@given(st.integers(16, 300), seeds)
def test_short_samples_lose_no_text(room, seed):
    options = BlankOptions(short_seq_prob=1.0)
    text = text_of(text_length("mask", room, options))
    samples = blanks.make_samples("mask", text, generator(seed), SPECIAL, options, room)
    rebuilt = [token for sample in samples for token in rebuild(sample, SPECIAL.mask)]
    assert rebuilt == text.tolist()
    assert len(samples) == (2 if len(text) + 4 <= room else 1) and sum(map(len, samples)) <= room


def test_reference_cuts_a_third_of_its_targets():
    """500 tokens in 512 places: samples of 548.5 tokens on average, of whose targets 36% are lost."""
    options = BlankOptions(cut_targets=True)
    assert text_length("mask", 512, options) == 500
    assert text_length("gmask", 2048, options) == 2000
    whole, kept, targets = [], [], []
    for seed in range(300):
        full = blanks.mask_sample(text_of(500), generator(seed), SPECIAL, options)
        cut = blanks.mask_sample(text_of(500), generator(seed), SPECIAL, options, 512)
        assert len(cut) == 512 and (cut.tokens == full.tokens[:512]).all()
        whole.append(len(full))
        targets.append(len(full) - full.context)
        kept.append(512 - cut.context)
    assert np.mean(whole) == pytest.approx(548.5, abs=0.7)
    assert 1 - sum(kept) / sum(targets) == pytest.approx(0.36, abs=0.01)


def test_reference_drops_the_rest_of_a_short_sample():
    options = BlankOptions(short_seq_prob=1.0, cut_targets=True)
    samples = blanks.make_samples("mask", text_of(500), generator(0), SPECIAL, options, 512)
    text = rebuild(samples[0], SPECIAL.mask)
    assert len(samples) == 1 and text == text_of(len(text)).tolist() and len(text) < 500


@given(lengths, seeds)
@settings(max_examples=25)
def test_samples_depend_on_the_generator_alone(length, seed):
    for objective in ("mask", "gmask", "smask"):
        first, second = (
            blanks.make_samples(
                objective, text_of(length), generator(seed), SPECIAL, PLAIN, 10_000, np.ones(2000, bool)
            )[0]
            for _ in range(2)
        )
        assert all((left == right).all() for left, right in zip(first[:4], second[:4], strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"single_span_prob": 1.5}, "from 0 to 1"),
        ({"mask_ratio": 0.0}, "above 0"),
        ({"mask_segments": 0}, "at least 1"),
        ({"mean_span": 0.0}, "above 0"),
        ({"block_mask_prob": 0.1}, "dBLOCK"),
    ],
)
def test_bad_options_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        BlankOptions(**options)


def test_too_little_room_and_missing_sentence_ends_are_refused():
    with pytest.raises(UserError, match="do not fit 4 tokens"):
        text_length("gmask", 4, PLAIN)
    with pytest.raises(UserError, match="sentence_ends"):
        blanks.make_samples("smask", text_of(9), generator(0), SPECIAL, PLAIN, 99)
