"""GLM as pure functions of (config, params, arrays). No mesh, no optimizer, no text."""

from glm_jax.config.model import GLMConfig
from glm_jax.model.transformer import Cache, apply, apply_cached, init, init_cache, logical_axes
from glm_jax.model.visibility import Visibility

__all__ = ["Cache", "GLMConfig", "Visibility", "apply", "apply_cached", "init", "init_cache", "logical_axes"]
