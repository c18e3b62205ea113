"""Optimizer, precision, state, step, and the run with its observers."""
