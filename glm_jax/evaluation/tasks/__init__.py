"""Small real tasks by name, made from text that a run has not trained on: builders, no texts."""
