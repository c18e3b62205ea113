"""GLM-10B-Chinese, first stage: rows of 512 tokens; name your corpora in data.sources.

    glm-jax train --config experiments/glm_10b_chinese.py --workdir runs/glm_10b_chinese \
        --config.data.tokenizer.path=cog-pretrain.model --config.data.sources... \
        --config.mesh.data=64 --config.mesh.tensor=4 --config.train.microbatches=4

The tokenizer is cog-pretrain.model of the published code (SentencePiece). F: the launch and DeepSpeed files of the
published code (github.com/THUDM/GLM, config/). The files do not name the GPUs: 256 are those of the published launch
script. glm_10b_chinese_second.py continues from its weights. original_glm says what of the original's blanks is left
out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 50_048  # the Chinese SentencePiece model's 50,000 and GLM's specials, padded


def get_config() -> Config:
    """Return 48 layers of 4096, 64 heads, rows of 512 tokens; the position tables have room for 1,024."""
    config = original_glm(48, 4096, 64, VOCABULARY, 1024)
    config.data.blanks.update(mask=0.5, smask=0.3, gmask=0.2, gmask_min_ratio=0.25, short_seq_prob=0.02)  # F
    original_schedule(  # F
        config, steps=150_000, gpu_batch=21, gpus=256, peak_lr=1e-4, warmup=0.04, decay_steps=120_000, floor=0.1
    )
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
