"""Instructions: no rows, 5% and 20% of them, scored on tasks that training does not show (15 members).

    glm-jax sweep --config experiments/ablations/instructions.py --workdir runs/instructions

Question: 5% of GLM-130B's rows were instructions, for the sake of tasks that are not among them. Do a few instruction
rows lower the loss on answers to other kinds of questions, and what do they cost on text?

Members train on four questions about a sentence: repeat it, count its words, name its first word, or its longest. They
are never shown its second word and its last (near), nor the summary of a docstring (far). Scored records are held
out as well, of the tasks that are shown and of the others.

Criterion: `loss/last`, `loss/second` and `loss/summaries`, held-out losses in nats a token of the answers, and
`loss/en` on text, over five seeds.
"""

from glm_jax.config import Config, instructions, small_english

SHOWN, UNSHOWN = ("copy", "count", "first", "longest"), ("last", "second")


def get_config() -> Config:
    """Return the base, for 3,000 steps, with four tasks to train on and three to score alone."""
    config = small_english(steps=3000)
    for name in SHOWN:
        config.data.instructions[name] = instructions(sample=f"sentence-{name}", weight=1.0)
    for name in UNSHOWN:
        config.data.instructions[name] = instructions(sample=f"sentence-{name}", score_only=True)
    config.data.instructions.summaries = instructions(sample="docstring-summaries", score_only=True)
    config.data.blanks.instruction_segments = 1
    return config


def get_sweep() -> dict:
    """Return share of instructions x seed."""

    def share(instruction: float) -> dict[str, float]:
        text = 1 - instruction
        return {"data.blanks.mask": 0.3 * text, "data.blanks.gmask": 0.7 * text, "data.blanks.instruction": instruction}

    return {
        "instructions": {"0%": share(0.0), "5%": share(0.05), "20%": share(0.2)},
        "seed": (1, 2, 3, 4, 5),
    }
