"""Meshes, partition specs and the pipeline. Knows arrays and functions, not GLM."""

from glm_jax.parallel.pipeline import schedule

__all__ = ["schedule"]
