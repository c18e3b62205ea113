"""Anchor: do the findings of the small ablations keep their sign at 10 million parameters? (4 members)

    glm-jax sweep --config experiments/ablations/anchor.py --workdir runs/anchor

Question: the other ablations have 0.4 million parameters. Here four members have 10 million (12 layers of 256, 2,000
pieces) and an hour of one core each, with GLM-130B's choices and one of them changed at a time.

Criterion: the sign of each change's held-out loss less the base's, beside the sign of the small ablation. There is one
seed, so a difference below the small ablation's spread over seeds has no sign.

Expected time: 2.8 hours on two cores.
"""

from glm_jax.config import Config, small_english


def get_config() -> Config:
    """Return the base: 12 layers of 256, 16 rows of 64 tokens."""
    config = small_english(steps=1500)
    config.model.num_layers = 12
    config.model.hidden_size = 256
    config.model.num_heads = 8
    config.model.ffn_size = 688
    config.data.tokenizer.vocab_size = 2000
    config.train.global_batch = 16
    config.optimizer.warmup_samples = 1600  # 100 steps
    return config


def get_sweep() -> dict:
    """Return the change alone; every member has the same seed."""
    return {
        "change": {
            "none": {},
            "pre-embedding-norm": {"model.norm": "pre", "model.embedding_norm": True},
            "gelu": {"model.activation": "gelu", "model.ffn_size": 1032},
            "alibi": {"model.position": "alibi"},
        },
        "seed": (1,),
    }
