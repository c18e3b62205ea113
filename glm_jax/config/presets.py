"""Configs that several experiments start from."""

from __future__ import annotations

from glm_jax.config.experiment import Config, default_config, source


def small_english(steps: int) -> Config:
    """Return 8 layers of width 64 on the docstrings of Python packages: 500 pieces, rows of 64 tokens, 8 rows a batch.

    With so few pieces, a few hundred steps are enough to learn more than their frequencies. A step takes about 0.06 s
    on one core. All other keys have their defaults: norm, positions, activation and Adam's constants are GLM-130B's,
    but there is no shrink and no dropout, and everything is float32.
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
    config.optimizer.peak_lr = 1e-3  # at ten times this rate DeepNorm stops learning
    config.optimizer.min_lr = 1e-4
    config.optimizer.warmup_samples = 320  # 40 steps
    return config


def original_glm(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, longest: int) -> Config:
    """Return what all sizes of the original GLM share: Pre-LN, tanh GELU, two learned position streams, only [MASK].

    The [gMASK] values are the published code's defaults, for the sizes that give it a share. The published code draws
    blanks differently: no span contains the end of a document; a batch has one [gMASK] length; 410M and 515M mark
    document spans with [MASK]. Block masking (0.1 in 2B and 10B) is off, because our tokenizers have no dBLOCK, nor a
    class token to begin samples in; with the original's (docs/texts.md), which have both, set
    data.blanks.block_mask_prob and block_mask_token.

    Args:
        num_layers, hidden_size, num_heads: of this size.
        vocab_size: rows of the embedding, including padding.
        longest: tokens of a row; the position tables have one more row (arXiv 2103.10360 and its published code).
    """
    config = default_config()
    config.model.num_layers = num_layers
    config.model.hidden_size = hidden_size
    config.model.num_heads = num_heads
    config.model.ffn_size = 4 * hidden_size
    config.model.norm = "pre"
    config.model.position = "learned_2d"
    config.model.activation = "gelu_tanh"
    config.model.initialisation = "normal"
    config.model.attention_dropout = 0.1
    config.model.hidden_dropout = 0.1
    config.model.score_scaling = False
    config.model.vocab_size = vocab_size
    config.model.max_length = longest + 1
    config.data.seq_length = longest
    config.data.blanks.update(mask=1.0, gmask=0.0, gmask_min_ratio=0.5, gmask_infill_prob=0.5)
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    return config
