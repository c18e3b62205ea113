"""Filling blanks with a trained GLM."""

from glm_jax.inference.model import Model

__all__ = ["Model"]
