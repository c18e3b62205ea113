"""Width: how sensitive Pre-LN and DeepNorm are to the learning rate, from 32 to 256 wide (96 members).

    glm-jax sweep --config experiments/ablations/width.py --workdir runs/width

Question: all other ablations are 64 wide. Does the best rate fall with width, and does either scheme become more
sensitive to the rate? A trend over a factor of 8 is the least that may be extended to larger models.

Both schemes have a norm on the embedding, DeepNorm by its definition. Heads are 16 wide at every width.

Criterion: the best held-out loss of a width, and the sensitivity (arXiv 2309.14322): the mean over the rates of the
loss less that best, where a member that diverged counts as guessing by frequency (glm_jax/sweeps/frontier.py).

Expected time: 2.9 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english

LEARNING_RATES = (5e-4, 1.5e-3, 5e-3, 1.5e-2)


def get_config() -> Config:
    """Return the base, for 600 steps."""
    return small_english(steps=600)


def get_sweep() -> dict:
    """Return width x scheme x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "width": {
            str(width): {
                "model.hidden_size": width,
                "model.num_heads": width // 16,
                "model.ffn_size": 8 * width // 3 // 2 * 2,
            }
            for width in (32, 64, 128, 256)
        },
        "norm": {
            "pre-embedding-norm": {"model.norm": "pre", "model.embedding_norm": True},
            "deepnorm": {"model.norm": "deepnorm"},
        },
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": seeds(3),
    }
