"""Objectives: bidirectional against unidirectional, with and without 5% of instructions (9 members).

    glm-jax sweep --config experiments/ablations/objectives.py --workdir runs/objectives

Question: GLM-130B reads its context in both directions, and 5% of its rows are instructions. Does a small model
continue a text better if it can read the first half in both directions? Do instructions raise the loss on text?

Criterion: `loss/second_half`, the held-out loss on the second half of a text given the first, mean and spread over
three seeds (glm_jax/sweeps/second_half.py): all members predict the same tokens from the same preceding tokens.
Held-out `loss` is each member's own objective, and cannot be compared across members.

Unidirectional is [gMASK] over whole texts: the blank itself is the only context, so every row trains a causal language
model. It has a loss on every token of a row; the others only on their blanks, about half of the tokens of a row. This
advantage in signal at equal steps is part of the comparison. The instructions ask for summaries of docstrings.
"""

from glm_jax.config import Config, instructions, small_english


def get_config() -> Config:
    """Return the base, for 800 steps, with an example set of instructions."""
    config = small_english(steps=800)
    config.data.instructions.summaries = instructions(sample="docstring-summaries")
    config.data.blanks.instruction_segments = 1
    return config


def get_sweep() -> dict:
    """Return objective x seed."""

    def shares(mask: float, gmask: float, instruction: float) -> dict[str, float]:
        return {"data.blanks.mask": mask, "data.blanks.gmask": gmask, "data.blanks.instruction": instruction}

    return {
        "objective": {
            "bidirectional": shares(0.3, 0.7, 0.0),
            "unidirectional": {**shares(0.0, 1.0, 0.0), "data.blanks.gmask_min_ratio": 1.0},
            "with-instructions": shares(0.285, 0.665, 0.05),
        },
        "seed": (1, 2, 3),
    }
