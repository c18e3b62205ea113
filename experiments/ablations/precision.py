"""Precision: float16 with and without query-key scaling and PB-Relax (20 members).

    glm-jax sweep --config experiments/ablations/precision.py --workdir runs/precision

Question: attention scores can exceed float16's limit of 65,504. CogView's authors therefore relax them (PB-Relax);
GLM-130B's scale queries and keys by the layer's number. Does either change what a small model learns in float16,
compared with float32?

Criterion: held-out loss after the last step, and the number of steps skipped because gradients were not finite, at
equal seeds over five of them (glm_jax/sweeps/paired.py). On a CPU, each operation returns float16, with
wider sums inside: overflow and rounding are those of float16, speed is not. Scores of a model of this size are about a
thousand times below the limit, so equal losses say that both methods cost nothing, not that large models could do
without them.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base, for 800 steps; the loss scale may grow after 200 good ones."""
    config = small_english(steps=800)
    config.train.loss_scale.window = 200
    return config


def get_sweep() -> dict:
    """Return (precision, treatment of scores) x seed."""
    half = {"train.precision": "float16"}
    return {
        "precision": {
            "float32": {"model.score_scaling": False},
            "float16": {**half, "model.score_scaling": False},
            "float16-scaling": {**half, "model.score_scaling": True},
            "float16-pb_relax": {**half, "model.score_scaling": False, "model.pb_relax": 128.0},
        },
        "seed": seeds(),
    }
