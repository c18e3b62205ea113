"""Depth, 48 layers: the schemes after 4,000 steps (18 members).

    glm-jax sweep --config experiments/ablations/depth_48.py --workdir runs/depth_48

Question: after 400 steps of norms.py DeepNorm had the lowest loss at 48 layers, but a control, Pre-LN with a norm on
the embedding, was lower still. Which is ahead after ten times as many steps? Does Post-LN learn at all?

Criterion: the number of members that learnt (glm_jax/sweeps/verdict.py) and the held-out loss by rate, over three seeds
of data and params. The rates are the best of norms.py for both schemes that learn, and a third of it.

Expected time: 4.5 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english

LEARNING_RATES = (5e-4, 1.5e-3)


def get_config() -> Config:
    """Return the base: 48 layers, for 4,000 steps."""
    config = small_english(steps=4000)
    config.model.num_layers = 48
    return config


def get_sweep() -> dict:
    """Return arm x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "arm": {
            "deepnorm": {"model.norm": "deepnorm"},
            "post": {"model.norm": "post"},
            "pre-embedding-norm": {"model.norm": "pre", "model.embedding_norm": True},
        },
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": seeds(3),
    }
