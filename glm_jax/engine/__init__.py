"""GLM on a mesh: the model's functions bound to the pipeline."""
