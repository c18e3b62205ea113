"""Fine-tune the quickstart's weights to say whether a Chinese review is positive, on answers alone.

    glm-jax train --config quickstart --workdir runs/quickstart
    glm-jax train --config finetune_reviews --workdir runs/reviews

trains all params. Add `--config.train.freeze="('embedding', 'blocks/0..1')"` to keep a part as it is, or
`--config.train.lora.rank=8` to train adapters alone. Weights elsewhere: `--config.train.init_from=WORKDIR`. Then

    glm-jax generate --workdir runs/reviews --prompt '房间很大，服务也好\\n这条评论是正面的还是负面的？'

docs/finetuning.md has what each of the three reached.
"""

from glm_jax.config import Config, default_config, instructions


def get_config() -> Config:
    """Return 100 steps of 16 rows, four reviews a row; a twentieth of the reviews is held out."""
    config = default_config()
    config.train.init_from = "runs/quickstart"
    config.data.instructions.reviews = instructions(sample="chinese-reviews")
    config.data.blanks.update(mask=0.0, gmask=0.0, instruction=1.0, instruction_blank="gmask")
    config.train.steps = 100
    config.train.microbatches = 4
    config.train.eval_every = 100
    config.optimizer.peak_lr = 1e-3
    config.optimizer.min_lr = 1e-4
    config.optimizer.warmup_samples = 160  # 10 steps
    return config
