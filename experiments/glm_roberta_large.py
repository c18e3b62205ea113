"""GLM-RoBERTa-Large, as it was trained; name your corpora in data.sources.

    glm-jax train --config experiments/glm_roberta_large.py --workdir runs/glm_roberta_large \
        --config.data.tokenizer.path=vocab.json --config.data.sources...

The tokenizer is vocab.json of RoBERTa, with merges.txt beside it (BPE). F: the launch and DeepSpeed files of the
published code (github.com/THUDM/GLM, config/). P: the paper, arXiv 2103.10360. All rows are [MASK]: the published model
knows nothing else, though F mixes objectives. The files do not name the GPUs: 64 x 8 x 16 rows are 8,192, RoBERTa's
batch. P stopped after 250,000 of F's 500,000 steps: --config.train.steps=250_000 is that run. The linear decay of the
published code has no floor, it ends at 0; here it ends at the floor that F asks for. original_glm says what of the
original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 50_304  # RoBERTa's 50,265 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 24 layers of 1024, 16 heads, rows of 512 tokens."""
    config = original_glm(24, 1024, 16, VOCABULARY)
    original_schedule(  # F
        config, steps=500_000, gpu_batch=16, accumulated=8, gpus=64, peak_lr=4e-4, warmup=0.06, decay_steps=500_000,
        floor=0.025,
    )  # fmt: skip
    config.optimizer.decay = "linear"
    config.optimizer.weight_decay = 0.01
    return config
