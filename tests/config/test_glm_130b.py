"""GLM-130B's experiment against hand values."""

import runpy
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.config import Experiment, resolve
from glm_jax.data.rows.experiment import training_batches
from tests.data.rows import SPECIAL, Documents

EXPERIMENTS = Path(__file__).parents[2] / "experiments"


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
