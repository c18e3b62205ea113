"""GLM-Large, 335M: the model, blanks and optimizer of the original GLM; name corpora in data.sources.

All rows are [MASK]. original_glm says what of the original's blanks is left out.

glm-jax train --config experiments/glm_335m.py --workdir runs/glm_335m --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 30_592  # bert-base-uncased's 30,522 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 24 layers of 1024, 16 heads, rows of 512 tokens."""
    config = original_glm(24, 1024, 16, VOCABULARY, 512)
    config.optimizer.peak_lr = 0.0002
    config.optimizer.min_lr = 1e-05
    return config
