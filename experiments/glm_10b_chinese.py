"""GLM-10B-Chinese: the model and optimizer of the original GLM; name corpora in data.sources.

glm-jax train --config experiments/glm_10b_chinese.py --workdir runs/glm_10b_chinese --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 50_048  # the Chinese SentencePiece model's 50,000 and GLM's specials, padded


def get_config() -> Config:
    """Give 48 layers of 4096, 64 heads, rows of 1,024 tokens."""
    config = original_glm(48, 4096, 64, VOCABULARY, 1024)
    config.optimizer.peak_lr = 0.0001
    config.optimizer.min_lr = 1e-05
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
