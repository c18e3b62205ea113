"""Softmax: float16 against float32 scores, where attention scores grow (27 members).

    glm-jax sweep --config experiments/ablations/softmax.py --workdir runs/softmax

Question: GLM-130B's authors found that attention scores outgrow float16 and compute the softmax in float32 (section 3.3
of the paper). precision.py had scores a thousand times below the limit, which tests nothing. Scores grow with the
learning rate and the steps, in small models too (arXiv 2309.14322). Does a float16 softmax cost anything once they have
grown, and do norms on queries and keys, which keep them small, make up for it?

Everything but the softmax is float16 in all members, with Pre-LN, which survives the highest rates. There are 8,000
pieces and 2,000 steps, and the two upper rates are at and above the rate at which 8 layers do best.

Criterion: held-out loss by rate at equal seeds, the number of diverged members and of skipped steps. The curves
`attention_scores/layer_00` and `activation_rms/layer_00`, and so on, say whether scores grew at all: if the largest
stays below 100, float16 resolves them to 0.06 or better, and equal losses say nothing about the paper's claim.

Expected time: 2.4 hours on two cores.
"""

from glm_jax.config import Config, seeds, small_english

LEARNING_RATES = (5e-3, 1.5e-2, 5e-2)


def get_config() -> Config:
    """Return the base: 8,000 pieces, float16, 2,000 steps, with the scores of each layer logged."""
    config = small_english(steps=2000)
    config.data.tokenizer.vocab_size = 8000
    config.model.norm = "pre"
    config.train.precision = "float16"
    config.train.loss_scale.window = 200
    config.train.log_every = 20
    config.train.log_attention_scores = True
    return config


def get_sweep() -> dict:
    """Return softmax x learning rate (the cosine ends at a tenth) x seed."""
    return {
        "softmax": {
            "float32": {},
            "float16": {"model.softmax_dtype": "float16"},
            "float16-qk-norm": {"model.softmax_dtype": "float16", "model.qk_norm": True},
        },
        "lr": {f"{lr:g}": {"optimizer.peak_lr": lr, "optimizer.min_lr": lr / 10} for lr in LEARNING_RATES},
        "seed": seeds(3),
    }
