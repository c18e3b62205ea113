"""Feed-forward: GeGLU against GELU at equal parameters (10 members).

    glm-jax sweep --config experiments/ablations/feedforward.py --workdir runs/feedforward

Question: GLM-130B's authors chose GeGLU, because gated units do better at equal parameters (arXiv 2002.05202). Does
this show in the held-out loss of a small model?

Criterion: held-out loss after the last step, at equal seeds over five of them (glm_jax/sweeps/paired.py). GeGLU
has three matrices of width 172, GELU two of width 258: 33,432 against 33,346 parameters a layer.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base, for 800 steps."""
    return small_english(steps=800)


def get_sweep() -> dict:
    """Return activation, at equal parameters, x seed."""
    return {
        "feedforward": {
            "geglu": {"model.activation": "geglu", "model.ffn_size": 172},
            "gelu": {"model.activation": "gelu", "model.ffn_size": 258},
        },
        "seed": seeds(),
    }
