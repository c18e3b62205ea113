"""GLM-2B, as its published launch file trains it; name your corpora in data.sources.

    glm-jax train --config experiments/glm_2b.py --workdir runs/glm_2b \
        --config.data.tokenizer.path=vocab.json --config.data.sources...

The tokenizer is vocab.json of GPT-2, with merges.txt beside it (BPE). F: the launch and DeepSpeed files of the
published code (github.com/THUDM/GLM, config/). The files do not name the GPUs: 256 are those of the published launch
script. original_glm says what of the original's blanks is left out, and how to set a mesh.
"""

from glm_jax.config import Config, original_glm, original_schedule

VOCABULARY = 50_304  # GPT-2's 50,257 pieces and GLM's specials, padded


def get_config() -> Config:
    """Return 36 layers of 2048, 32 heads, rows of 512 tokens; the position tables have room for 1,024."""
    config = original_glm(36, 2048, 32, VOCABULARY, 1024)
    config.data.blanks.update(mask=0.4, smask=0.3, gmask=0.3, gmask_min_ratio=0.25, short_seq_prob=0.02)  # F
    original_schedule(  # F
        config, steps=250_000, gpu_batch=32, gpus=256, peak_lr=1e-4, warmup=0.04, decay_steps=175_000, floor=0.1
    )
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    return config
