"""Meshes and partition specs. Knows arrays and functions, not GLM."""

from glm_jax.parallel.pipeline import schedule

__all__ = ["schedule"]
