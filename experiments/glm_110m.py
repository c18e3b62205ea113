"""GLM-Base, 110M, as it was trained; name your corpora in data.sources.

    glm-jax train --config experiments/glm_110m.py --workdir runs/glm_110m \
        --config.data.tokenizer.path=vocab.txt --config.data.sources...

The tokenizer is vocab.txt of bert-base-uncased (WordPiece). F: the launch and DeepSpeed files of the published code
(github.com/THUDM/GLM, config/). P: the paper, arXiv 2103.10360. All rows are [MASK] (F). The files do not name the
GPUs: 64 x 16 rows are P's batch of 1,024. original_glm says what of the original's blanks is left out, and how to set a
mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 30_592  # bert-base-uncased's 30,522 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 12 layers of 768, 12 heads, rows of 512 tokens."""
    config = original_glm(12, 768, 12, VOCABULARY)
    original_schedule(  # F
        config, steps=150_000, gpu_batch=16, gpus=64, peak_lr=4e-4, warmup=0.05, decay_steps=120_000, floor=0.05
    )
    return config
