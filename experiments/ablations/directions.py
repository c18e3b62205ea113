"""Directions: contexts seen in both directions against contexts seen from left to right (30 members).

    glm-jax sweep --config experiments/ablations/directions.py --workdir runs/directions

Question: objectives.py compares GLM with a causal language model that has a loss on twice as many tokens. Here members
of a seed have the same rows and the same targets, and the same loss on them. Only what the tokens of a context see
differs: all of the context, or what is before them. What is reading in both directions worth?

Criterion: held-out loss at equal seeds, for [MASK] spans, whose context continues behind the blank, for [gMASK]
suffixes, and for GLM-130B's mixture of both. With [MASK] the target sees the context on both sides of its blank in
either case: the difference is what the states of the context know of one another.

Expected time: 0.7 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english


def get_config() -> Config:
    """Return the base, for 2,000 steps."""
    return small_english(steps=2000)


def get_sweep() -> dict:
    """Return objective x visibility of the context x seed."""
    return {
        "objective": {
            "mask": {"data.blanks.mask": 1.0, "data.blanks.gmask": 0.0},
            "gmask": {"data.blanks.mask": 0.0, "data.blanks.gmask": 1.0},
            "mixture": {},
        },
        "context": {"both-directions": {}, "left-to-right": {"data.blanks.causal_context": True}},
        "seed": seeds(),
    }
