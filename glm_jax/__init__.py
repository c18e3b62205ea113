"""GLM-130B in JAX: blank infilling, trained on a data x pipeline x tensor mesh."""
