"""GLM-130B's experiment and its training log against hand values, of which none comes from the code under test.

Facts: table 11 of the paper; the published log; and the launch file of 1 June 2022 (commit 066ee8c of a public fork of
the training code), which has --multitask-ratio 0.05, --multitask-data-transform-steps 22850 2000,
--lr-auto-warmup-steps 22800 2000, --shrink-logit-embedding-gradient, --shrink-embedding-gradient-alpha 0.165 and
--shrink-embedding-gradient-steps 22850 6000.
"""

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.config import Experiment, recipe, resolve
from glm_jax.config.interventions import effective
from glm_jax.data.rows.experiment import training_batches
from tests.data.rows import SPECIAL, Documents

EXPERIMENTS = Path(__file__).parents[2] / "experiments"
SEEN = 83_655_480  # samples after step 22,800: the ramp's, and 4,224 for each later step


@pytest.fixture(scope="module")
def log() -> Experiment:
    return resolve(runpy.run_path(str(EXPERIMENTS / "glm_130b_log.py"))["get_config"]())


def rows_of(config: Experiment, first: int, count: int) -> Counter[str]:
    """Count rows by source and objective, such as `pile/mask`, of small sources with the names of the config's."""
    texts = {name: {"train": Documents([9000] * 4)} for name in config.data.sources}
    sets = {name: SimpleNamespace(train=Documents([10] * 40)) for name in config.data.instructions}
    prepared: Any = SimpleNamespace(
        shards=texts,
        weights={name: entry.weight for name, entry in config.data.sources.items()},
        instructions=sets,
        instruction_weights=dict.fromkeys(sets, 40.0),
        tokenizer=SPECIAL,
    )
    batches = training_batches(config, prepared)
    located = [batches.locate(row) for row in range(first, first + count)]
    return Counter(f"{batches.sources[row.source]}/{row.objective}" for row in located)


def test_half_the_rows_of_text_are_english_and_wudao_has_four_fifths_of_the_chinese() -> None:
    config = resolve(runpy.run_path(str(EXPERIMENTS / "glm_130b.py"))["get_config"]())
    assert {name: entry.language for name, entry in config.data.sources.items()} == {
        "pile": "en", "wudao": "zh", "chinese_web": "zh"
    }  # fmt: skip
    rows = rows_of(config, 10**7, 10_000)  # of which 95% are text: [MASK] 28.5%, [gMASK] 66.5%
    expected = {"pile/mask": 1425, "wudao/mask": 1140, "chinese_web/mask": 285, "pile/gmask": 3325,
                "wudao/gmask": 2660, "chinese_web/gmask": 665, "multitask/instruction": 500}  # fmt: skip
    assert rows == pytest.approx(expected, abs=7)  # labels


# By step. The new sets' rows are 4,224 x 0.05 = 211.2 times the share that has moved, (step - 1/2 - 22,850) / 2,000 in
# the middle of the step, from 0 to 1. Alpha is 1 - no shrink - up to 22,800; 0.2 up to 22,850; then by mistake
# 0.2 + 0.8 (step - 22,850) / 26,850, and after the restart from 23,200 it is 0.165 + 0.835 (step - 22,850) / 6,000.
# The learning rate is 8e-6 + 7.2e-5 (1 + cos(pi p)) / 2, with p = (samples - 1,098,632) / (197,753,905 - 1,098,632) and
# samples = SEEN + 4,224 (step - 22,800), times (step - 22,800) / 2,000 up to step 24,800. At 22,800, p = 82,556,848 /
# 196,655,273 = 0.419805, whose cosine is 0.249283; at 23,850, 86,992,048 / 196,655,273 = 0.442358 gives 0.180099.
REPLAY = {  # new sets' rows, alpha of the lookup's path and of the head's, learning rate
    22_800: (0.00, 1.0, 1.0, 5.29742e-5),
    22_801: (0.00, 0.2, 0.2, 5.29719e-5 / 2000),
    22_850: (0.00, 0.2, 0.2, 5.28565e-5 * 50 / 2000),
    22_851: (0.05, 0.2000298, 0.2000298, 5.28542e-5 * 51 / 2000),
    23_000: (15.79, 0.2044693, 0.2044693, 5.25029e-5 * 200 / 2000),
    23_200: (36.91, 0.2104283, 0.2104283, 5.20300e-5 * 400 / 2000),
    23_201: (37.01, 0.2138475, 0.2138475, 5.20277e-5 * 401 / 2000),
    23_850: (105.55, 0.3041667, 0.3041667, 5.04836e-5 * 1050 / 2000),
    24_800: (205.87, 0.4363750, 0.4363750, 4.82018e-5),
    24_801: (205.97, 0.4365142, 0.4365142, 4.81994e-5),
    24_850: (211.15, 0.4433333, 0.4433333, 4.80811e-5),
    24_851: (211.20, 0.4434725, 0.4434725, 4.80787e-5),
}


@pytest.mark.parametrize("step", REPLAY)
def test_the_replay_of_the_restart_at_22800(log: Experiment, step: int) -> None:
    new, alpha, alpha_head, lr = REPLAY[step]
    config = effective(log, step - 1)
    before = SEEN + 4224 * (step - 1 - 22_800)
    rows = rows_of(config, before, 4224)
    assert sum(rows.values()) == recipe.batch_rows(config, before) == 4224
    assert rows["multitask/instruction"] + rows["multitask_0601/instruction"] == pytest.approx(211.2, abs=1)
    assert rows["multitask_0601/instruction"] == pytest.approx(new, abs=1)
    assert sum(rows[f"{name}/mask"] for name in config.data.sources) == pytest.approx(0.285 * 4224, abs=2)
    chosen, shrink = recipe.describe(config, step, before), config.train.embedding_shrink
    assert chosen["embedding_shrink"] == pytest.approx(alpha, abs=1e-7)
    assert (chosen["embedding_shrink"] if shrink.logits else 1.0) == pytest.approx(alpha_head, abs=1e-7)
    assert chosen["lr"] == pytest.approx(lr, rel=1e-5)


def test_the_rest_of_the_log_by_hand(log: Experiment) -> None:
    shrinks = {1: 0.1, 6_000: 0.1, 6_250: 0.55, 6_500: 1.0, 28_850: 1.0, 33_600: 1.0, 33_601: 0.5, 35_200: 0.5,
               35_201: 0.1, 49_300: 0.1}  # fmt: skip
    for step, alpha in shrinks.items():
        config = effective(log, step - 1)
        assert recipe.embedding_shrink(config, step) == pytest.approx(alpha)
        assert config.train.embedding_shrink.logits == (step > 22_800)  # to the end
    samples = 0
    for _ in range(22_800):
        samples += recipe.batch_rows(log, samples)
    assert samples == SEEN

    def lr(step: int, seen: int) -> float:
        return recipe.learning_rate(effective(log, step - 1), step, seen)

    peak, floor, half = 8e-5, 8e-6, 99_426_268  # halfway between warm-up and the end of the cosine
    assert lr(100, 549_316) == pytest.approx(peak / 2)
    assert lr(20_000, half) == pytest.approx((peak + floor) / 2, rel=1e-6)
    assert lr(26_001, half) == pytest.approx((4e-5 + floor) / 2, rel=1e-6)
    assert lr(42_701, half) == pytest.approx((4e-5 + 4e-6) / 2, rel=1e-6)
    assert recipe.skip(effective(log, 40_700), 40_700, samples) == (40_900, samples + 200 * 4224)
    assert recipe.skip(effective(log, 42_400), 42_400, samples)[0] == 42_600
    assert log.train.steps == 49_300
