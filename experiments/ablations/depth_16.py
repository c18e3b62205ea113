"""Depth, 16 layers: do the schemes still differ after ten times as many steps? (50 members)

    glm-jax sweep --config experiments/ablations/depth_16.py --workdir runs/depth_16

Question: in norms.py Post-LN learnt nothing in 400 steps from 16 layers on. That may be slow and not impossible. Does
it learn in 4,000 steps, or after a warm-up of 400 instead of 40? Does DeepNorm keep its lead over Pre-LN with a norm on
the embedding?

Criterion: the number of members that learnt (glm_jax/sweeps/verdict.py) and the held-out loss by rate, over five seeds
of data and params. The rates are the two lowest of norms.py: the higher is DeepNorm's best, the lower suits Post-LN.

Expected time: 4.3 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english

LEARNING_RATES = (5e-4, 1.5e-3)
WARM = {"optimizer.warmup_samples": 3200}  # 400 steps


def get_config() -> Config:
    """Return the base: 16 layers, for 4,000 steps."""
    config = small_english(steps=4000)
    config.model.num_layers = 16
    return config


def get_sweep() -> dict:
    """Return arm x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "arm": {
            "deepnorm": {"model.norm": "deepnorm"},
            "post": {"model.norm": "post"},
            "post-warmup-400": {"model.norm": "post", **WARM},
            "pre-embedding-norm": {"model.norm": "pre", "model.embedding_norm": True},
            "deepnorm-warmup-400": {"model.norm": "deepnorm", **WARM},
        },
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": seeds(),
    }
