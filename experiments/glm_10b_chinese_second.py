"""GLM-10B-Chinese, second stage: rows of 1,024 tokens, from the weights of glm_10b_chinese.py.

    glm-jax train --config experiments/glm_10b_chinese_second.py --workdir runs/glm_10b_chinese_second \
        --config.data.tokenizer.path=cog-pretrain.model --config.data.sources... \
        --config.mesh.data=64 --config.mesh.tensor=4 --config.train.microbatches=4 \
        --config.train.init_from=runs/glm_10b_chinese

The tokenizer is cog-pretrain.model of the published code (SentencePiece). F: the launch and DeepSpeed files of the
published code (github.com/THUDM/GLM, config/). The files do not name the GPUs: 256 are those of the published launch
script. F counts steps on from the first stage and does not say where it stopped: here it stops where the rate has
fallen. original_glm says what of the original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 50_048  # the Chinese SentencePiece model's 50,000 and GLM's specials, padded


def get_config() -> Config:
    """Return 48 layers of 4096, 64 heads, rows of 1,024 tokens."""
    config = original_glm(48, 4096, 64, VOCABULARY, 1024)
    config.data.seq_length = 1024
    config.data.blanks.update(mask=0.5, smask=0.3, gmask=0.2, gmask_min_ratio=0.25, short_seq_prob=0.5)  # F
    original_schedule(  # F
        config, steps=20_000, gpu_batch=8, gpus=256, peak_lr=3e-5, warmup=0.025, decay_steps=20_000, floor=0.1
    )
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
