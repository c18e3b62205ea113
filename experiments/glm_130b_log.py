"""GLM-130B with the incidents of its training log as interventions: what its operators changed, and at which step.

    glm-jax config show --config experiments/glm_130b_log.py

As in experiments/glm_130b.py, name your corpora in data.sources and data.instructions. Dates are of 2022, from the
published log. An incident that was answered by going back to a checkpoint stands at that checkpoint's step. Left out is
what the log tells of data that are not named here (about 31 May, step 23,500, DeepStruct was added; 1 June, step
24,500, one noisy prompt each of two sets was removed), attempts that failed, and the position ids of 29 June, which
were taken back.
"""

import importlib.util
from pathlib import Path

from glm_jax.config import Config

SAMPLES = 83_655_480  # seen after step 22,800; the log counts steps only, so this follows from the batch's ramp
RAMP = 2000 * 4224  # samples
MIXTURE = {"mask": 0.285, "gmask": 0.665, "instruction": 0.05}
TEXT = {"mask": 0.3, "gmask": 0.7, "instruction": 0.0}


def get_config() -> Config:
    """Return glm_130b.py's config with `interventions`."""
    config = _glm_130b()
    config.train.steps = 49_300  # 3 July: the end
    # 6 May: the shrink begins at 0.1, on the input path alone; when its path through the head was shrunk too, which
    # the code could do from 30 May on, the log does not say. 7 May, step 4,000: two nodes die, saves every 100 steps.
    config.train.save_every = 100
    config.interventions = (
        # 10 May: the shrink is lifted linearly over 500 steps
        (6_000, {"train.embedding_shrink.history": ((6_000, 0.1), (6_500, 1.0))}),
        # 28 and 29 May: corrected instruction data diverge; in the end their share (here from none, which is assumed:
        # text alone had been stable), the learning rate and the shrink climb anew
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
    """Load the experiment beside this one: experiments are files, not modules of a package."""
    spec = importlib.util.spec_from_file_location("glm_130b", Path(__file__).with_name("glm_130b.py"))
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config()
