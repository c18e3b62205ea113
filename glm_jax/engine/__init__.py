"""GLM on a mesh: the model's functions bound to the pipeline, and passes over a batch."""

from glm_jax.engine.bind import EngineConfig, Sums, loss_metrics
from glm_jax.engine.build import Engine, build

__all__ = ["Engine", "EngineConfig", "Sums", "build", "loss_metrics"]
