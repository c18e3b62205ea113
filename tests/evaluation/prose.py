"""A small English and Chinese corpus with sentences, lines and a config on it, for tasks about held-out text."""

from __future__ import annotations

import random
from pathlib import Path

from glm_jax.config import Config, default_config, source

WORDS = ("small", "large", "array", "model", "returns", "takes", "gives", "shape", "type", "value", "axis", "house")
CHARACTERS = "话说天下大势分久必合周末七国争并入于秦及灭之后楚汉又"


def documents(language: str, count: int = 60) -> list[str]:
    """Return texts, each of several lines of sentences."""
    draw = random.Random(language)
    if language == "zh":
        return ["".join("".join(draw.choices(CHARACTERS, k=20)) + "。" for _ in range(8)) for _ in range(count)]
    sentences = (" ".join(draw.choices(WORDS, k=9)).capitalize() + "." for _ in range(8 * count))
    return ["\n".join(next(sentences) for _ in range(8)) for _ in range(count)]


def config(folder: Path) -> Config:
    """Write the corpus, and return the config of a tiny model whose rows hold the questions of tasks."""
    config = default_config()
    for language in ("en", "zh"):
        path = folder / f"{language}.txt"
        path.write_text("\n\n".join(documents(language)), encoding="utf-8")
        config.data.sources[language] = source(path=str(path), language=language)
    config.data.cache = str(folder / "cache")
    config.data.heldout = 0.2
    config.data.near_duplicates = 0.0
    config.data.seq_length = 128
    config.data.tokenizer.vocab_size = 400
    config.model.update(num_layers=3, hidden_size=16, num_heads=2, ffn_size=32, vocab_multiple=16)
    config.train.update(steps=4, global_batch=4, microbatches=2, log_every=1, eval_every=0, eval_rows=4, save_every=2)
    config.optimizer.warmup_samples = 4
    return config
