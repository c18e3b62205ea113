"""Precision: float16 with and without query-key scaling and PB-Relax (8 members).

    glm-jax sweep --config experiments/ablations/precision.py --workdir runs/precision

Question: attention scores that outgrow float16's 65,504 made CogView's authors relax them (PB-Relax), and GLM-130B's
scale queries and keys by the layer's number. Does either change what a small model learns, in float16 against float32?

Criterion: held-out loss after the last step and the number of steps that were skipped for gradients that were not
finite, over two seeds. On a CPU, each operation gives what float16 can hold and sums inside it are wider, so that
overflow and rounding are those of float16, speed is not. A model of this size has scores some thousand times below
the limit: equal losses say that both methods cost nothing, and not that large models could do without.
"""

from glm_jax.config import Config, small_english


def get_config() -> Config:
    """Return the base, for 800 steps; the loss scale may grow after 200 good ones."""
    config = small_english(steps=800)
    config.train.loss_scale.window = 200
    return config


def get_sweep() -> dict:
    """Return precision and the treatment of scores x seed."""
    half = {"train.precision": "float16"}
    return {
        "precision": {
            "float32": {"model.score_scaling": False},
            "float16": {**half, "model.score_scaling": False},
            "float16-scaling": {**half, "model.score_scaling": True},
            "float16-pb_relax": {**half, "model.score_scaling": False, "model.pb_relax": 128.0},
        },
        "seed": (1, 2),
    }
