"""AdamW with a learning rate that follows the samples seen (paper appendix B, table 11)."""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import optax

from glm_jax.config import Config

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    """The optimizer's constants; defaults are GLM-130B's."""

    peak_lr: float = 8e-5
    min_lr: float = 8e-6
    warmup_samples: int = 1_098_632
    decay_samples: int = 197_753_905
    beta1: float = 0.9
    beta2: float = 0.95
    epsilon: float = 1e-8
    weight_decay: float = 0.1
    clip_norm: float = 1.0

    @classmethod
    def from_config(cls, config: Config) -> OptimizerConfig:
        """Read the section `optimizer`; `decay_samples` 0 becomes the run's last sample."""
        values = config.optimizer.to_dict()
        values["decay_samples"] = values["decay_samples"] or config.train.steps * config.train.global_batch
        return cls(**values)


def learning_rate(cfg: OptimizerConfig, samples: Array) -> Array:
    """Give the learning rate of the step that ends with `samples` rows seen, a float32 scalar.

    Linear from 0 at no samples to the peak at `warmup_samples`, then a cosine that reaches `min_lr` at
    `decay_samples` and stays there.
    """
    seen = samples.astype(jnp.float32)
    warmup = seen / max(cfg.warmup_samples, 1)
    progress = (seen - cfg.warmup_samples) / max(cfg.decay_samples - cfg.warmup_samples, 1)
    cosine = 0.5 * (1.0 + jnp.cos(jnp.pi * jnp.clip(progress, 0.0, 1.0)))
    decayed = cfg.min_lr + (cfg.peak_lr - cfg.min_lr) * cosine
    return jnp.where(seen < cfg.warmup_samples, cfg.peak_lr * warmup, decayed)


def decays(params: Any) -> Any:
    """Say which params weight decay touches: kernels and the embedding, not layer norms and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key not in ("scale", "bias"), params)


def transformation(cfg: OptimizerConfig) -> optax.GradientTransformation:
    """Give AdamW's direction; the caller multiplies by the learning rate (Loshchilov and Hutter, arXiv 1711.05101)."""
    return optax.chain(
        optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon),
        optax.add_decayed_weights(cfg.weight_decay, mask=decays),
    )


def update(
    cfg: OptimizerConfig, gradients: Any, moments: Any, params: Any, lr: Array
) -> tuple[Any, Any, dict[str, Array]]:
    """Clip by global norm, then take one AdamW step.

    Returns:
        The new params, the new moments, and `grad_norm`, the global norm before clipping.
    """
    norm = optax.tree.norm(gradients)
    factor = jnp.minimum(1.0, cfg.clip_norm / (norm + 1e-6))
    gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
    directions, moments = transformation(cfg).update(gradients, moments, params)
    params = jax.tree.map(lambda param, direction: param - lr * direction, params, directions)
    return params, moments, {"grad_norm": norm}
