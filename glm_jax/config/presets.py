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


def seeds(count: int = 5) -> dict[str, dict[str, int]]:
    """Return an axis of a sweep: members with a seed of the data, and another of the params, each of their own."""
    return {str(seed): {"seed": seed, "model_seed": 100 + seed} for seed in range(1, count + 1)}


def original_glm(num_layers: int, hidden_size: int, num_heads: int, vocab_size: int, longest: int = 512) -> Config:
    """Return what all sizes of the original GLM share: Pre-LN, tanh GELU, two learned position streams, only [MASK].

    Rows have 512 tokens, weights are float16. The [gMASK] values are the published code's, for the sizes that give it a
    share: half the blanks are anywhere in the text and end in eop, those at its end do not.

    What still differs from the published code: its samples begin with ENC, and it hides a tenth of the [MASK] targets'
    inputs as dBLOCK in 2B, 10B and the Chinese sizes. Our own tokenizers have neither token. The original's
    (docs/texts.md) have both: ENC, which is [CLS], then begins samples, and data.blanks.block_mask_prob and
    block_mask_token turn the second on. All [gMASK] blanks of a batch have one length there, here each has its own; no
    span there contains the end of a document; and Doc, 410M and 515M mark document spans with [MASK].

    The mesh is the user's: a batch comes in microbatches of what one GPU had, so n data ranks take mesh.data=n and an
    n-th of the microbatches.

    Args:
        num_layers, hidden_size, num_heads: of this size.
        vocab_size: rows of the embedding, including padding.
        longest: tokens of the longest row; the position tables have one more row (arXiv 2103.10360 and its code).
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
    config.data.seq_length = 512
    config.data.blanks.update(mask=1.0, gmask=0.0, gmask_min_ratio=0.5, gmask_infill_prob=0.5, gmask_eop=False)
    config.train.precision = "float16"
    config.train.loss_scale.window = 1000
    config.optimizer.beta2 = 0.98
    config.optimizer.epsilon = 1e-6
    return config


def original_schedule(
    config: Config, *, steps: int, gpu_batch: int, gpus: int, peak_lr: float, warmup: float, decay_steps: int,
    floor: float, accumulated: int = 1,
) -> None:  # fmt: skip
    """Set the length, the batch and the learning rate from the numbers in the original GLM's launch files.

    Args:
        config: changed in place.
        steps: `--train-iters`.
        gpu_batch: `train_micro_batch_size_per_gpu`, the rows of a microbatch.
        gpus: that split the batch.
        peak_lr: `lr`.
        warmup: `--warmup`, a share of `decay_steps`.
        decay_steps: `--lr-decay-iters`, from the first step, warm-up included.
        floor: `--lr-decay-ratio`, the last rate as a share of `peak_lr`.
        accumulated: `gradient_accumulation_steps`.
    """
    config.train.steps = steps
    config.train.microbatches = accumulated * gpus
    config.train.global_batch = batch = gpu_batch * accumulated * gpus
    config.optimizer.peak_lr = peak_lr
    config.optimizer.min_lr = peak_lr * floor
    config.optimizer.warmup_samples = round(warmup * decay_steps) * batch
    config.optimizer.decay_samples = decay_steps * batch
