"""Modern: norms on queries and keys, and z-loss, against GLM-130B's choices (72 members).

    glm-jax sweep --config experiments/ablations/modern.py --workdir runs/modern

Question: later models keep attention scores small by a layer norm on each head's queries and keys (ViT-22B, arXiv
2302.05442), and logits by a penalty on log(Z)^2 (PaLM, arXiv 2204.02311). Do these raise the highest stable rate or
lower the loss, with Pre-LN, for which they were proposed, and with DeepNorm?

Criterion: the highest stable rate by seed and the held-out loss by rate, as in norms.py. Held-out losses leave the
penalty out.

Expected time: 0.6 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english

LEARNING_RATES = (1.5e-3, 5e-3, 1.5e-2)


def get_config() -> Config:
    """Return the base, for 800 steps, with the scores of each layer logged."""
    config = small_english(steps=800)
    config.train.log_attention_scores = True
    return config


def get_sweep() -> dict:
    """Return norm x addition x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "model.norm": ("pre", "deepnorm"),
        "addition": {
            "none": {},
            "qk-norm": {"model.qk_norm": True},
            "z-loss": {"train.z_loss": 1e-4},
            "both": {"model.qk_norm": True, "train.z_loss": 1e-4},
        },
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": seeds(3),
    }
