"""Positions: RoPE, ALiBi, the original GLM's two learned streams (15 members).

    glm-jax sweep --config experiments/ablations/positions.py --workdir runs/positions

Question: GLM-130B's authors chose RoPE over ALiBi, and over the original GLM's two learned position streams. Does it
show in the held-out loss of a small model on short rows?

Criterion: held-out loss after the last step, at equal seeds over five of them (glm_jax/sweeps/paired.py).
Rows have 64 tokens, as in training. Rows longer than those trained on, the purpose of ALiBi, are not tested.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base, for 800 steps."""
    return small_english(steps=800)


def get_sweep() -> dict:
    """Return position x seed."""
    return {"model.position": ("rope", "alibi", "learned_2d"), "seed": seeds()}
