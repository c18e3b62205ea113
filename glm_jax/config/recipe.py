"""The settings of each step, as pure functions of the config, the step and the samples seen, computed on the host.

Steps are numbered from 1. The learning rate and the batch size follow the samples (paper, table
11); the embedding shrink, re-warming and skipped steps follow the steps, as in GLM-130B's training log.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from glm_jax.config import Experiment


def batch_rows(config: Experiment, samples: int) -> int:
    """Return the batch size of the step that starts with `samples` rows seen.

    A ramp (first batch, increment, samples) grows the batch to train.global_batch by equal increments, spread evenly
    over its samples (GLM-130B: 192 to 4,224 by 24 over 5,493,164).
    """
    full = config.train.global_batch
    if not config.train.batch_ramp:
        return full
    start, increment, length = config.train.batch_ramp
    increments = (full - start) // increment
    return min(start + samples * increments // length * increment, full)


def total_samples(config: Experiment) -> int:
    """Return the number of samples seen after the last step."""
    samples, steps = 0, config.train.steps
    while steps and batch_rows(config, samples) < config.train.global_batch:
        samples, steps = samples + batch_rows(config, samples), steps - 1
    return samples + steps * config.train.global_batch


def steps_for(config: Experiment, samples: int) -> int:
    """Return the number of steps after which at least so many samples are seen, at the batch sizes of the ramp."""
    seen = steps = 0
    while seen < samples and batch_rows(config, seen) < config.train.global_batch:
        seen, steps = seen + batch_rows(config, seen), steps + 1
    return steps + max(0, -(-(samples - seen) // config.train.global_batch))


def learning_rate(config: Experiment, step: int, samples: int) -> float:
    """Return the learning rate of `step`, which ends with `samples` rows seen.

    It rises linearly from 0 at the start to the peak at `warmup_samples`, then falls to `min_lr` at `decay_samples`,
    as half a cosine or linearly, and stays there. In the window (first, steps) of a re-warming it is multiplied by
    (step - first) / steps: a warm restart after loading. Stairs (first, steps, factor) multiply it by the factor after
    `first`, and again every `steps` steps.
    """
    cfg = config.optimizer
    if samples < cfg.warmup_samples:
        lr = cfg.peak_lr * samples / cfg.warmup_samples
    else:
        end = cfg.decay_samples or total_samples(config)
        progress = min((samples - cfg.warmup_samples) / max(end - cfg.warmup_samples, 1), 1.0)
        left = 1.0 - progress if cfg.decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
        lr = cfg.min_lr + (cfg.peak_lr - cfg.min_lr) * left
    for first, steps in cfg.rewarm:
        if first < step <= first + steps:
            lr *= (step - first) / steps
    if cfg.stairs and step > cfg.stairs[0]:
        first, steps, factor = cfg.stairs
        lr *= factor ** (1 + (step - first - 1) // steps)
    return lr


def embedding_shrink(config: Experiment, step: int) -> float:
    """Return alpha of the embedding gradient shrink at `step`, linear between the knots of its history."""
    cfg = config.train.embedding_shrink
    if not cfg.history:
        return cfg.alpha
    steps, alphas = zip(*cfg.history, strict=True)
    return float(np.interp(step, steps, alphas))


def shrinks(config: Experiment) -> bool:
    """Whether any step shrinks the embedding's gradient."""
    cfg = config.train.embedding_shrink
    return any(alpha != 1.0 for _, alpha in cfg.history or ((0, cfg.alpha),))


def skip(config: Experiment, step: int, samples: int) -> tuple[int, int]:
    """Return the step and samples to continue from after `step`: past any skipped steps that follow it.

    A skipped step is never taken, but it counts: for the data and the schedules its rows are seen.
    """
    while step < config.train.steps and any(first <= step + 1 <= last for first, last in config.train.skip_steps):
        step, samples = step + 1, samples + batch_rows(config, samples)
    return step, samples


def describe(config: Experiment, step: int, samples: int) -> Mapping[str, float]:
    """Return the settings of `step`, which starts with `samples` rows seen."""
    rows = batch_rows(config, samples)
    return {
        "lr": learning_rate(config, step, samples + rows),
        "embedding_shrink": embedding_shrink(config, step),
        "batch": rows,
    }
