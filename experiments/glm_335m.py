"""GLM-Large, 335M, as it was trained; name your corpora in data.sources.

    glm-jax train --config experiments/glm_335m.py --workdir runs/glm_335m \
        --config.data.tokenizer.path=vocab.txt --config.data.sources...

The tokenizer is vocab.txt of bert-large-uncased (WordPiece), the same file as bert-base-uncased's. F: the launch and
DeepSpeed files of the published code (github.com/THUDM/GLM, config/). P: the paper, arXiv 2103.10360. All rows are
[MASK], as in the published model. The files do not name the GPUs: 64 x 16 rows are P's batch of 1,024. original_glm
says what of the original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 30_592  # bert-large-uncased's 30,522 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 24 layers of 1024, 16 heads, rows of 512 tokens."""
    config = original_glm(24, 1024, 16, VOCABULARY)
    original_schedule(  # F
        config, steps=200_000, gpu_batch=16, gpus=64, peak_lr=2e-4, warmup=0.05, decay_steps=160_000, floor=0.05
    )
    return config
