"""Fine-tune the released GLM-10B on your own prompts and answers, on answers alone; 8 devices of 80 GB.

    glm-jax train --config finetune_glm_10b --workdir runs/mine --config.train.init_from=glm-10b \
        --config.data.instructions.mine.path=answers.jsonl --config.mesh.tensor=8

glm-10b is a clone of the released Hugging Face folder, whose vocab.json, merges.txt and added_tokens.json are taken as
the tokenizer; a folder of SAT's works as well, with --config.data.tokenizer.path=vocab.json. answers.jsonl has a pair a
line, {"prompt": ..., "answer": ...}, or a chat, {"messages": [...]} (docs/texts.md). Only adapters of rank 16 are
trained, so AdamW's moments take 0.4 GB in all; with --config.train.lora.rank=0 all 9.9 G params are.

Not run at this size: no such machine was at hand. The rates are common choices for adapters, not the authors'.
"""

from glm_jax.config import Config, instructions, original_glm


def get_config() -> Config:
    """Return GLM-10B (48 layers of 4096) with adapters, rows of 1,024 tokens, for 1,000 steps of 32 rows."""
    config = original_glm(48, 4096, 64, 50_304, 1024)
    config.data.seq_length = 1024
    config.data.instructions.mine = instructions(path="answers.jsonl")
    config.data.blanks.update(mask=0.0, gmask=0.0, instruction=1.0, instruction_segments=1)
    config.train.init_from = "glm-10b"
    config.train.lora.rank = 16
    config.train.lora.alpha = 32.0
    config.train.precision = "bfloat16"
    config.train.steps = 1000
    config.train.global_batch = 32
    config.train.microbatches = 16
    config.optimizer.peak_lr = 2e-4
    config.optimizer.min_lr = 2e-5
    config.optimizer.decay = "linear"
    config.optimizer.warmup_samples = 3200
    config.optimizer.weight_decay = 0.0
    return config
