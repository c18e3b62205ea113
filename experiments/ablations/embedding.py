"""Embedding: gradient shrink, and a layer norm on the embedding (15 members).

    glm-jax sweep --config experiments/ablations/embedding.py --workdir runs/embedding

Question: GLM-130B's authors saw the embedding's gradient spike a few steps before the loss did. They shrank it to a
tenth; BLOOM's authors put a layer norm on the embedding instead. How does each change the embedding's gradient,
compared with that of the layers, and the loss, if nothing spikes by itself?

Criterion: the curves `grad_norm/embedding` and `grad_norm/blocks_*` of each member, and held-out loss after the last
step, at equal seeds over five of them (glm_jax/sweeps/paired.py). The learning rate is twice that of the other
ablations, closer to instability.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base, for 800 steps at a high learning rate, with its norms logged often."""
    config = small_english(steps=800)
    config.optimizer.peak_lr = 2e-3
    config.optimizer.min_lr = 2e-4
    config.train.log_every = 5
    return config


def get_sweep() -> dict:
    """Return treatment of the embedding x seed."""
    return {
        "embedding": {
            "plain": {},
            "shrink": {"train.embedding_shrink.alpha": 0.1},
            "norm": {"model.embedding_norm": True},
        },
        "seed": seeds(),
    }
