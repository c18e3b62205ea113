"""Shrink: does embedding gradient shrink raise the rate at which a float16 model breaks? (20 members)

    glm-jax sweep --config experiments/ablations/shrink.py --workdir runs/shrink

Question: embedding.py shrank the gradient of models that begin with a norm on the embedding (DeepNorm's) and that never
spiked: there was nothing to shrink and nothing to prevent. GLM-130B's authors shrank it where the embedding's gradient
spiked before the loss did. Pre-LN and Sandwich-LN without an embedding norm, in float16 and near the rate at which they
break, are the nearest case at this size.

Each member takes 800 steps at 2e-3. Then the rate doubles every 100 steps, up to 1.02, so that each spends 100 steps
just below the rate that breaks it. The vocabulary of 8,000 has rare pieces, whose gradients are few and large.

Criterion: the rate at which a member breaks (glm_jax/sweeps/verdict.py), on a logarithmic scale, with and without the
shrink at equal seeds; and the largest `grad_norm/embedding` in the 100 steps before that.

Expected time: 1.5 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base: 8,000 pieces, float16, 800 steps at one rate, and 9 stairs of 100."""
    config = small_english(steps=1700)
    config.data.tokenizer.vocab_size = 8000
    config.optimizer.peak_lr = config.optimizer.min_lr = 2e-3
    config.optimizer.stairs = (800, 100, 2)
    config.train.precision = "float16"
    config.train.loss_scale.window = 200
    config.train.log_every = 5
    config.train.eval_every = 0
    return config


def get_sweep() -> dict:
    """Return norm x alpha x seed."""
    return {
        "model.norm": ("pre", "sandwich"),
        "shrink": {"none": {}, "tenth": {"train.embedding_shrink.alpha": 0.1}},
        "seed": seeds(),
    }
