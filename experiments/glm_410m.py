"""GLM-410M (also called 1.25): the model, blanks and optimizer of the original GLM; name corpora in data.sources.

Half the rows are [MASK]; the other half have one blank over 50 to 100% of the text, which in half of these may be
anywhere. These are the defaults of its published code for a model of tokens and documents. original_glm says what of
the original's blanks is left out.

glm-jax train --config experiments/glm_410m.py --workdir runs/glm_410m --config.data.sources...
"""

from glm_jax.config import Config, original_glm

VOCABULARY = 30_592  # bert-base-uncased's 30,522 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 30 layers of 1024, 16 heads, rows of 512 tokens."""
    config = original_glm(30, 1024, 16, VOCABULARY, 512)
    config.data.blanks.update(mask=0.5, gmask=0.5)
    config.optimizer.peak_lr = 0.0002
    config.optimizer.min_lr = 1e-05
    return config
