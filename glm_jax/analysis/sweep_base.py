"""The small model that the ablations of experiments/ablations/ start from."""

from glm_jax.config import Config, default_config, source


def small_english(steps: int) -> Config:
    """Give 8 layers of 64 on the docstrings of Python packages: 500 pieces, rows of 64 tokens, 8 rows a batch.

    With so few pieces some hundred steps are enough to learn more than how frequent they are. A step takes a core some
    0.06 s. What is not named here is a default: norm, positions, activation and Adam's constants are GLM-130B's, but
    there is no shrink and no dropout, and it is all float32.
    """
    config = default_config()
    config.model.num_layers = 8
    config.model.hidden_size = 64
    config.model.num_heads = 4
    config.model.ffn_size = 172
    config.data.sources.en = source(sample="python-docs", language="en")
    config.data.tokenizer.vocab_size = 500
    config.data.seq_length = 64
    config.train.steps = steps
    config.train.global_batch = 8
    config.train.eval_rows = 512
    config.optimizer.peak_lr = 1e-3  # DeepNorm stops learning at ten times as much
    config.optimizer.min_lr = 1e-4
    config.optimizer.warmup_samples = 320  # 40 steps
    return config
