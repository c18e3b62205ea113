"""GLM-515M, also called 1.5, for tokens and documents; name your corpora in data.sources.

    glm-jax train --config experiments/glm_515m.py --workdir runs/glm_515m \
        --config.data.tokenizer.path=vocab.txt --config.data.sources...

The tokenizer is vocab.txt of bert-large-uncased (WordPiece), the same file as bert-base-uncased's. Half the rows are
[MASK]; the other half have one blank over 50 to 100% of the text, which in half of these may be anywhere: the defaults
of the published code for a model of tokens and documents. The launch files of the published code (github.com/THUDM/GLM,
config/) have none of this size: length, batch and learning rate are those of GLM-Large (glm_335m.py). original_glm says
what of the original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 30_592  # bert-large-uncased's 30,522 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 30 layers of 1152, 18 heads, rows of 512 tokens."""
    config = original_glm(30, 1152, 18, VOCABULARY)
    config.data.blanks.update(mask=0.5, gmask=0.5)
    original_schedule(  # as in glm_335m.py
        config, steps=200_000, gpu_batch=16, gpus=64, peak_lr=2e-4, warmup=0.05, decay_steps=160_000, floor=0.05
    )
    return config
