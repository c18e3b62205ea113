"""A tiny bilingual experiment, and the command line as a user runs it."""

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.patience import HANG

EXPERIMENT = '''
"""A tiny bilingual GLM for tests."""
from glm_jax.config import default_config, source


def get_config():
    config = default_config()
    config.model.num_layers = 3
    config.model.hidden_size = 32
    config.model.num_heads = 2
    config.model.ffn_size = 48
    config.model.vocab_multiple = 16
    config.model.hidden_dropout = 0.1
    config.data.cache = "{cache}"
    config.data.seq_length = 64
    config.data.tokenizer.vocab_size = 480
    config.data.sources.en = source(path="{texts}/en.txt", language="en")
    config.data.sources.zh = source(path="{texts}/zh.jsonl", format="jsonl", language="zh")
    config.train.steps = 12
    config.train.global_batch = 8
    config.train.microbatches = 2
    config.train.log_every = 1
    config.train.eval_every = 6
    config.train.eval_rows = 16
    config.train.save_every = 5
    config.optimizer.peak_lr = 1e-2
    config.optimizer.warmup_samples = 16
    return config
'''

WORDS = "the a small large array model returns takes gives shape type of with for new old value axis and"
ENGLISH = tuple(WORDS.split(" "))
CHINESE = "话说天下大势分久必合合久必分周末七国分争并入于秦及秦灭之后楚汉分争又并入于汉"


@pytest.fixture(scope="session")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write two small corpora and an experiment on them; all tests of the session share its cache."""
    folder = tmp_path_factory.mktemp("tiny")
    draw = random.Random(0)
    english = [" ".join(draw.choices(ENGLISH, k=60)).capitalize() + "." for _ in range(120)]
    chinese = ["".join(draw.choices(CHINESE, k=90)) + "。" for _ in range(120)]
    (folder / "en.txt").write_text("\n\n".join(english), encoding="utf-8")
    (folder / "zh.jsonl").write_text("".join(f'{{"text": "{text}"}}\n' for text in chinese), encoding="utf-8")
    path = folder / "tiny.py"
    path.write_text(EXPERIMENT.format(cache=folder / "cache", texts=folder), encoding="utf-8")
    return path


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """Return the environment of a subprocess: one device unless a test asks for more."""
    return {**os.environ, "JAX_PLATFORMS": "cpu"}


@pytest.fixture(scope="session")
def glm_jax(environment: dict[str, str]) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Return a function that runs `glm-jax` with arguments and returns the finished process."""

    def run(*arguments: str | Path, devices: int = 1) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "glm_jax", *map(str, arguments)],
            env={**environment, "JAX_NUM_CPU_DEVICES": str(devices)},
            capture_output=True,
            text=True,
            timeout=HANG,
        )

    return run
