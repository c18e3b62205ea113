"""Scores of trained models: tasks with choices, generation and language modelling, by the rules of GLM-130B."""
