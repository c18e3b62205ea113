"""GLM-130B with the incidents of its training log as interventions: what its operators changed, and at which step.

    glm-jax config show --config experiments/glm_130b_log.py

As in experiments/glm_130b.py, name your corpora in data.sources and data.instructions. Dates are of 2022, from the
published log. If the operators went back to a checkpoint, the incident is listed at that checkpoint's step. Left out:
changes to data that are not named here (about 31 May, step 23,500: DeepStruct added; 1 June, step 24,500: one noisy
prompt removed from each of two sets), attempts that failed, and the position ids of 29 June, which were reverted.
"""

import importlib.util
from pathlib import Path

from glm_jax.config import Config

SAMPLES = 83_655_480  # seen after step 22,800; computed from the batch's ramp, because the log counts only steps
RAMP = 2000 * 4224  # samples
MIXTURE = {"mask": 0.285, "gmask": 0.665, "instruction": 0.05}
TEXT = {"mask": 0.3, "gmask": 0.7, "instruction": 0.0}


def get_config() -> Config:
    """Return glm_130b.py's config with `interventions`."""
    config = _glm_130b()
    config.train.steps = 49_300  # 3 July: the end
    # 6 May: the shrink begins at 0.1, only on the input path. From 30 May the code could also shrink the path through
    # the head; the log does not say when it did. 7 May, step 4,000: two nodes die, saves every 100 steps.
    config.train.save_every = 100
    config.interventions = (
        # 10 May: the shrink is lifted linearly over 500 steps
        (6_000, {"train.embedding_shrink.history": ((6_000, 0.1), (6_500, 1.0))}),
        # 28 and 29 May: the run diverges on corrected instruction data. In the end their share, the learning rate and
        # the shrink ramp up again. That the share starts at 0 is an assumption: text alone had been stable.
        (
            22_800,
            {
                "data.blanks.history": ((0, MIXTURE), (SAMPLES, MIXTURE), (SAMPLES, TEXT), (SAMPLES + RAMP, MIXTURE)),
                "optimizer.rewarm": ((22_800, 2_000),),
                "train.embedding_shrink.history": ((22_800, 0.2), (28_800, 1.0)),
            },
        ),
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
