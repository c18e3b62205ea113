"""Every key of an experiment, defined once: frozen, typed sections, and presets. No jax."""

from glm_jax.config.experiment import (
    Config,
    Experiment,
    by_key,
    default_config,
    default_values,
    definition,
    from_json,
    instructions,
    keys,
    resolve,
    role,
    source,
    to_json,
    with_changes,
)
from glm_jax.config.presets import original_glm, original_schedule, seeds, small_english

__all__ = [
    "Config",
    "Experiment",
    "default_config",
    "default_values",
    "definition",
    "from_json",
    "instructions",
    "keys",
    "original_glm",
    "original_schedule",
    "resolve",
    "role",
    "seeds",
    "small_english",
    "source",
    "to_json",
    "by_key",
    "with_changes",
]
