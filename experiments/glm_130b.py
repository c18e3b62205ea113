"""GLM-130B as planned for its training from 6 May to 3 July 2022, on 96 DGX-A100.

    glm-jax config show --config experiments/glm_130b.py
    glm-jax train --config experiments/glm_130b.py --workdir runs/glm_130b \
        --config.data.tokenizer.path=ice_text.model
    glm-jax convert sat-to-orbax --config experiments/glm_130b.py --path glm-130b-sat --out runs/released

The tokenizer is ice_text.model of icetk; with --config.data.tokenizer.pinned=True, as it was in 2022.

Put the corpora into the folders below, as jsonl files with a field `text`, or name other folders, for example with
--config.data.sources.pile.path=FOLDER. The prompts and answers of table 12's data sets are in one folder, too;
docs/texts.md says how to name data sets and their templates one by one. glm_130b_log.py has what changed on the way.

Sources: P, the paper (arXiv 2210.02414, tables 11 and 12, sections 2 and 3); L, its published training log; R, the
released inference code.
"""

from glm_jax.config import Config, default_config, instructions, source


def get_config() -> Config:
    """Return 70 layers of 12,288 with 96 heads: 128,697,794,560 parameters."""
    config = default_config()
    config.seed = 1234

    config.model.num_layers = 70  # P 2.3: 9 x 8 - 2, because embedding and head count as layers of the pipeline
    config.model.hidden_size = 12288
    config.model.num_heads = 96
    config.model.ffn_size = 32768
    config.model.norm = "deepnorm"
    config.model.position = "rope"
    config.model.activation = "geglu"
    config.model.attention_dropout = 0.1
    config.model.hidden_dropout = 0.1
    config.model.vocab_size = 150528  # icetk's 150,000 and the specials, padded to a multiple of 768 x 4
    config.model.max_length = 2048

    # P 2.2: 1.2T of the Pile, 1.0T of WuDao and 250G from the Chinese web; the run saw about 200e9 tokens of each
    # language. So half the rows are English, and the two Chinese corpora share the rest by size.
    config.data.sources.pile = source(path="corpora/pile", format="jsonl", language="en", weight=0.5)
    config.data.sources.wudao = source(path="corpora/wudao", format="jsonl", language="zh", weight=0.4)
    config.data.sources.chinese_web = source(path="corpora/chinese_web", format="jsonl", language="zh", weight=0.1)
    config.data.instructions.multitask = instructions(path="corpora/multitask")  # P C.1
    config.data.seq_length = 2048
    config.data.blanks.mask = 0.285  # P 2.2: 30% of 95% of the rows
    config.data.blanks.gmask = 0.665  # 70% of 95%
    config.data.blanks.instruction = 0.05
    config.data.blanks.mask_segments = 4  # 4 x 512, as with instructions; [gMASK] takes the row
    config.data.blanks.instruction_segments = 4
    config.data.blanks.single_span_prob = 0.02  # training code, as are the options of blanks below
    config.data.blanks.short_seq_prob = 0.02
    config.data.blanks.shortest_seq = 32
    config.data.blanks.gmask_eop = False
    config.data.blanks.cut_targets = True  # 500 tokens of text into 512 places
    config.data.blanks.replacement = True

    config.mesh.data = 24
    config.mesh.pipeline = 8
    config.mesh.tensor = 4

    config.train.global_batch = 4224
    config.train.batch_ramp = (192, 24, 5_493_164)  # P table 11: over the first 2.5% of the samples
    config.train.microbatches = 176  # of 24 rows, one for each data rank
    config.train.steps = 55_014  # 450e9 tokens, with those of the batch ramp; the released step is 49,300
    config.train.precision = "float16"
    config.train.loss_normalization = "microbatch"  # each row of 2,048 has the same weight, however few its targets
    config.train.embedding_shrink.alpha = (
        0.1  # L: 1 from step 6,500; again 0.2 to 1 after 22,850; 0.5 at 33,600; 0.1 from 35,200
    )
    config.train.loss_scale.window = 2000  # P table 11; the training code's own file said 200
    config.train.save_every = 250  # P table 11; L: 500, later 100
    config.train.eval_every = 1000

    config.optimizer.peak_lr = 8e-5  # P table 11; L: halved to 4e-5 at step 26,000
    config.optimizer.min_lr = 8e-6  # L: 4e-6 from step 42,700
    config.optimizer.warmup_samples = 1_098_632  # 0.5% of 219,726,562; P has it start at 1e-7, the code at 0
    config.optimizer.decay_samples = 197_753_905  # 90%
    config.optimizer.beta1 = 0.9
    config.optimizer.beta2 = 0.95
    config.optimizer.epsilon = 1e-8
    config.optimizer.weight_decay = 0.1
    config.optimizer.clip_norm = 1.0
    return config
