"""Optimizer, precision, the training step, checkpoints, metrics and the loop around them."""
