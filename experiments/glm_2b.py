"""GLM-2B: the model, blanks and optimizer of the original GLM; name corpora in data.sources.

Blanks are those of its published launch file, which had 512 tokens a sample. original_glm says what is left out
(block masking, 0.1).

glm-jax train --config experiments/glm_2b.py --workdir runs/glm_2b --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 50_304  # GPT-2's 50,257 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 36 layers of 2048, 32 heads, rows of 1,024 tokens."""
    config = original_glm(36, 2048, 32, VOCABULARY, 1024)
    config.data.blanks.update(mask=0.4, smask=0.3, gmask=0.3, gmask_min_ratio=0.25, short_seq_prob=0.02)
    config.optimizer.peak_lr = 0.0001
    config.optimizer.min_lr = 1e-05
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
