"""GLM as pure functions of (config, params, arrays). No mesh, no optimizer, no text."""

from glm_jax.config.model import GLMConfig
from glm_jax.model.cached import Cache, apply_cached, init_cache, layered
from glm_jax.model.transformer import apply, init, logical_axes, shapes
from glm_jax.model.visibility import Visibility

__all__ = [
    "Cache",
    "GLMConfig",
    "Visibility",
    "apply",
    "apply_cached",
    "init",
    "init_cache",
    "layered",
    "logical_axes",
    "shapes",
]
