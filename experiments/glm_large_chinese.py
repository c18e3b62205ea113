"""GLM-Large-Chinese, as it was trained; name your corpora in data.sources.

    glm-jax train --config experiments/glm_large_chinese.py --workdir runs/glm_large_chinese \
        --config.data.tokenizer.path=cog-pretrain.model --config.data.sources...

The tokenizer is cog-pretrain.model of the published code (SentencePiece). F: the launch and DeepSpeed files of the
published code (github.com/THUDM/GLM, config/). The files do not name the GPUs: 256 are those of the published launch
script. original_glm says what of the original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 50_048  # the Chinese SentencePiece model's 50,000 and GLM's specials, padded


def get_config() -> Config:
    """Return 24 layers of 1024, 16 heads, rows of 512 tokens; the position tables have room for 1,024."""
    config = original_glm(24, 1024, 16, VOCABULARY, 1024)
    config.data.blanks.update(mask=0.4, smask=0.3, gmask=0.3, gmask_min_ratio=0.25, short_seq_prob=0.02)  # F
    original_schedule(  # F
        config, steps=250_000, gpu_batch=32, gpus=256, peak_lr=4e-4, warmup=0.04, decay_steps=200_000, floor=0.1
    )
    config.optimizer.weight_decay = 0.01
    return config
