"""Instructions: no rows, 5% and 20% of them, scored on tasks that training does not show (15 members).

    glm-jax sweep --config experiments/ablations/instructions.py --workdir runs/instructions

Question: 5% of GLM-130B's rows were instructions, for the sake of tasks that are not among them. Do a few instruction
rows lower the loss on answers to other kinds of questions, and what do they cost on text?

Members train on four questions about a sentence: repeat it, name its first word, its second, or its longest. They are
never asked for its last word (near), nor for the number of its words (far). Scored records are held out as well, of the
tasks that are shown and of the others. Rows have 128 tokens, in which a sentence of up to eight words fits with its
question and its answer.

Criterion: `loss/last` and `loss/count`, held-out losses in nats a token of the answers, and `loss/en` on text, over
five seeds.

Expected time: 0.6 hours on two cores.
"""

from glm_jax.config import Config, instructions, seeds, small_english

SHOWN, UNSHOWN = ("copy", "first", "second", "longest"), ("last", "count")


def get_config() -> Config:
    """Return the base, for 3,000 steps, with four tasks to train on and two to score alone."""
    config = small_english(steps=3000)
    config.data.seq_length = 128
    config.train.global_batch = 4
    config.optimizer.warmup_samples = 160  # 40 steps, as in the other ablations
    for name in SHOWN:
        config.data.instructions[name] = instructions(sample=f"sentence-{name}", weight=1.0)
    for name in UNSHOWN:
        config.data.instructions[name] = instructions(sample=f"sentence-{name}", score_only=True)
    config.data.blanks.instruction_segments = 1
    return config


def get_sweep() -> dict:
    """Return share of instructions x seed."""

    def share(instruction: float) -> dict[str, float]:
        text = 1 - instruction
        return {"data.blanks.mask": 0.3 * text, "data.blanks.gmask": 0.7 * text, "data.blanks.instruction": instruction}

    return {
        "instructions": {"0%": share(0.0), "5%": share(0.05), "20%": share(0.2)},
        "seed": seeds(),
    }
