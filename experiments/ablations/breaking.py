"""Breaking: the learning rate at which a trained model breaks, by layer norm and depth (90 members).

    glm-jax sweep --config experiments/ablations/breaking.py --workdir runs/breaking

Question: norms.py measures how fast a model leaves the plateau of word frequencies, which is not stability. At which
rate does a model break that has learnt, and does it depend on the layer norm, on a norm on the embedding, and on depth?

Each member takes 800 steps at 5e-4, after a warm-up of 40. Then the rate is multiplied by 3 every 50 steps, up to 3.28.
glm_jax/sweeps/verdict.py says when it breaks; the rule was written before the run. Rates are compared on a logarithmic
scale, between arms over pairs of members with the same depth and seed (sweeps/paired.py). A member that has not learnt
after 800 steps is told apart by its loss there; its breaking says nothing about stability.

post and deepnorm begin with a norm on the embedding by their definition, pre and sandwich without; they are tried with
and without one. The seed of the data and that of the params differ from member to member.

Expected time: 3.4 hours on two cores, two thirds of them for 48 layers.
"""

from glm_jax.config import Config, seeds, small_english

ARMS = {
    "deepnorm": {"model.norm": "deepnorm"},
    "post": {"model.norm": "post"},
    "pre": {"model.norm": "pre"},
    "pre-embedding-norm": {"model.norm": "pre", "model.embedding_norm": True},
    "sandwich": {"model.norm": "sandwich"},
    "sandwich-embedding-norm": {"model.norm": "sandwich", "model.embedding_norm": True},
}


def get_config() -> Config:
    """Return the base: 800 steps at one rate, and 8 stairs of 50."""
    config = small_english(steps=1200)
    config.optimizer.peak_lr = config.optimizer.min_lr = 5e-4
    config.optimizer.stairs = (800, 50, 3)
    config.train.eval_every = 0
    return config


def get_sweep() -> dict:
    """Return depth x arm x seed."""
    return {
        "model.num_layers": (8, 16, 48),
        "arm": ARMS,
        "seed": seeds(),
    }
