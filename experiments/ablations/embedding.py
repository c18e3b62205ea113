"""Embedding: gradient shrink, and a layer norm on the embedding (9 members).

    glm-jax sweep --config experiments/ablations/embedding.py --workdir runs/embedding

Question: GLM-130B's authors saw the embedding's gradient spike some steps before the loss did. They shrank it to a
tenth; BLOOM's authors put a layer norm on the embedding instead. What does either do to the embedding's gradient, set
against the layers', and to the loss, where nothing spikes by itself?

Criterion: the curves `grad_norm/embedding` and `grad_norm/blocks_*` of each member, and held-out loss after the last
step, mean and spread over three seeds. The learning rate is twice the other ablations', nearer to instability.
"""

from glm_jax.config import Config, small_english


def get_config() -> Config:
    """Return the base, for 800 steps at a high learning rate, its norms logged often."""
    config = small_english(steps=800)
    config.optimizer.peak_lr = 2e-3
    config.optimizer.min_lr = 2e-4
    config.train.log_every = 5
    return config


def get_sweep() -> dict:
    """Return what is done to the embedding x seed."""
    return {
        "embedding": {
            "plain": {},
            "shrink": {"train.embedding_shrink.alpha": 0.1},
            "norm": {"model.embedding_norm": True},
        },
        "seed": (1, 2, 3),
    }
