"""Layer norms: which scheme trains at which depth and learning rate (240 members).

    glm-jax sweep --config experiments/ablations/norms.py --workdir runs/norms

Question: GLM-130B's authors found Pre-LN, Post-LN and Sandwich-LN unstable at scale and settled on DeepNorm. Do the
schemes differ at a scale that a laptop can run, and how does the highest stable learning rate change with depth?

Criterion, the same for all 240: glm_jax/sweeps/verdict.py says which members diverged. The stability frontier
of a scheme at a depth is, for each seed, the highest learning rate of the grid up to which no member diverged. Among
members that did not diverge, the held-out loss says how well a member did.

All schemes share the data, the five learning rates, the three seeds and one family of initialisation: Xavier normal
with each scheme's own depth coefficients (glm_jax/model/residual.py). Depth is the outer axis, so a sweep that is
stopped early has all schemes at the smaller depths.

Rates, steps and pieces were chosen, and the rule was written, after trials with seed 99, which is not used here; the
rule's last margin came later, as its file says. The rule cannot tell a member that learns slowly from one that has
stopped learning: at the lowest rate, look at the curve.

Expected time: two to three hours on two quiet cores.
"""

from glm_jax.config import Config, small_english

LEARNING_RATES = (5e-4, 1.5e-3, 5e-3, 1.5e-2, 5e-2)


def get_config() -> Config:
    """Return the base, for 400 steps."""
    return small_english(steps=400)


def get_sweep() -> dict:
    """Return depth x scheme x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "model.num_layers": (4, 8, 16, 48),
        "model.norm": ("post", "pre", "sandwich", "deepnorm"),
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": (1, 2, 3),
    }
