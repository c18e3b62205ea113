"""A tiny experiment for sweeps: 2 layers of 16 on made-up text."""

import random
from pathlib import Path
from typing import Any

from glm_jax.config import Config, default_config, resolve, source, with_changes

TEXT = "the a small large array model returns takes gives shape type of with for new old value axis and"
WORDS = tuple(TEXT.split(" "))


def write_text(folder: Path) -> Path:
    """Write a corpus in which the next word often follows from the last."""
    draw = random.Random(0)
    texts = []
    for _ in range(60):
        words = [draw.choice(WORDS)]
        while len(words) < 60:
            place = WORDS.index(words[-1])
            words.append(draw.choice(WORDS) if draw.random() < 0.3 else WORDS[(place * 7 + 3) % len(WORDS)])
        texts.append(" ".join(words) + ".")
    path = folder / "text.txt"
    path.write_text("\n\n".join(texts), encoding="utf-8")
    return path


def tiny(folder: Path, **changes: Any) -> Config:
    """Return the resolved config; its cache is in `folder`."""
    config = default_config()
    config.model.num_layers = 2
    config.model.hidden_size = 16
    config.model.num_heads = 2
    config.model.ffn_size = 24
    config.model.vocab_multiple = 16
    config.data.cache = str(folder / "cache")
    config.data.seq_length = 32
    config.data.tokenizer.vocab_size = 300
    config.data.sources.en = source(path=str(folder / "text.txt"))
    config.train.steps = 50
    config.train.global_batch = 4
    config.train.log_every = 1
    config.train.eval_every = 50
    config.train.eval_rows = 8
    config.optimizer.warmup_samples = 40
    return with_changes(resolve(config), changes)
