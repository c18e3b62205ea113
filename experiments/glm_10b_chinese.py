"""GLM-10B-Chinese: the model, blanks and optimizer of the original GLM; name corpora in data.sources.

Blanks are those of its second stage, with 1,024 tokens a sample. The first stage had 512, and short_seq_prob 0.02.
original_glm says what is left out (block masking, 0.1).

glm-jax train --config experiments/glm_10b_chinese.py --workdir runs/glm_10b_chinese --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 50_048  # the Chinese SentencePiece model's 50,000 and GLM's specials, padded


def get_config() -> Config:
    """Return 48 layers of 4096, 64 heads, rows of 1,024 tokens."""
    config = original_glm(48, 4096, 64, VOCABULARY, 1024)
    config.data.blanks.update(mask=0.5, smask=0.3, gmask=0.2, gmask_min_ratio=0.25, short_seq_prob=0.5)
    config.optimizer.peak_lr = 0.0001
    config.optimizer.min_lr = 1e-05
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
