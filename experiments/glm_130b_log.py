"""GLM-130B with the incidents of its training log as interventions: what its operators changed, and at which step.

    glm-jax config show --config experiments/glm_130b_log.py

Dates are of 2022. Sources: the published log, and F, the launch file in commit 066ee8c of a public fork of the training
code (XiaoqingNLP/LargeScale). If the operators went back to a checkpoint, the incident is listed at that checkpoint's
step. As in experiments/glm_130b.py, put your corpora where data.sources and data.instructions name them.

Left out: attempts that failed, the position ids of 29 June, which were reverted, and how the new sets grew while they
moved in: DeepStruct's came at step 23,500, and a noisy prompt of qqp and one of DeepStruct went at 24,500. Here the new
sets are the last ones throughout.
"""

import importlib.util
from pathlib import Path

from glm_jax.config import Config, instructions

BATCH = 4224
SAMPLES = 83_655_480  # seen after step 22,800; computed from the batch's ramp, because the log counts only steps
# By mistake the old sets were those of both parts of T0, training and zero-shot transfer, and none of DeepStruct's
# (paper, C.1).
OLD, NEW = {"multitask": 1.0, "multitask_0601": 0.0}, {"multitask": 0.0, "multitask_0601": 1.0}
MOVES = SAMPLES + 50 * BATCH  # step 22,850
MOVED = SAMPLES + 2050 * BATCH  # step 24,850


def get_config() -> Config:
    """Return glm_130b.py's config with `interventions`."""
    config = _glm_130b()
    config.data.instructions.multitask_0601 = instructions(path="corpora/multitask_0601")
    config.data.weights = ((0, OLD),)  # the corpora, which it leaves out, keep the weights of their entries
    config.train.steps = 49_300  # 3 July: the end
    config.train.save_every = 100  # 7 May, step 4,000: two nodes die
    # 6 May: the shrink begins at 0.1, only on the lookup's path
    config.interventions = (
        # 10 May: the shrink is lifted linearly over 500 steps
        (6_000, {"train.embedding_shrink.history": ((6_000, 0.1), (6_500, 1.0))}),
        # 28 and 29 May: the run diverges on corrected sets: at once, with 500 steps of warm-up, and if they move in
        # gradually. What works: they move in over 2,000 steps, the learning rate climbs again over 2,000, and the
        # shrink begins again, now on the head's path, too. F: --multitask-ratio 0.05, as before,
        # --multitask-data-transform-steps 22850 2000, --lr-auto-warmup-steps 22800 2000,
        # --shrink-logit-embedding-gradient. By mistake the shrink was to end only after 26,850 steps.
        (
            22_800,
            {
                "data.weights": ((0, OLD), (MOVES, OLD), (MOVED, NEW)),
                "optimizer.rewarm": ((22_800, 2_000),),
                "train.embedding_shrink.history": ((22_850, 0.2), (22_850 + 26_850, 1.0)),
                "train.embedding_shrink.logits": True,
            },
        ),
        # 30 May: a node fails, and the mistake is found; it shall end after 6,000 steps. F, of 1 June:
        # --shrink-embedding-gradient-alpha 0.165 --shrink-embedding-gradient-steps 22850 6000. So the new ramp meets
        # the old one here, at 0.21, which is why it is listed here.
        (23_200, {"train.embedding_shrink.history": ((22_850, 0.165), (28_850, 1.0))}),
        # 3 June: halved
        (26_000, {"optimizer.peak_lr": 4e-5}),
        # 12 June: the loss scale collapses at about 33,710, the loss explodes at 33,740
        (33_600, {"train.embedding_shrink.history": (), "train.embedding_shrink.alpha": 0.5}),
        # 14 June: the same at 35,250; kept to the end
        (35_200, {"train.embedding_shrink.alpha": 0.1}),
        # 20 June: the loss explodes at 40,800
        (40_700, {"train.skip_steps": ((40_701, 40_900),)}),
        # 22 June: the gradient norm jumps at 42,400, and later again
        (42_400, {"train.skip_steps": ((40_701, 40_900), (42_401, 42_600))}),
        (42_700, {"optimizer.min_lr": 4e-6}),
    )
    return config


def _glm_130b() -> Config:
    """Load the experiment next to this one: experiments are files, not modules of a package."""
    spec = importlib.util.spec_from_file_location("glm_130b", Path(__file__).with_name("glm_130b.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
