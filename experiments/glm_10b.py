"""GLM-10B: the model and optimizer of the original GLM; name corpora in data.sources.

glm-jax train --config experiments/glm_10b.py --workdir runs/glm_10b --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 50_304  # GPT-2's 50,257 pieces and GLM's specials, padded


def get_config() -> Config:
    """Give 48 layers of 4096, 64 heads, rows of 1,024 tokens."""
    config = original_glm(48, 4096, 64, VOCABULARY, 1024)
    config.optimizer.peak_lr = 0.0001
    config.optimizer.min_lr = 1e-05
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
