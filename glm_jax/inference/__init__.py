"""Filling blanks with a trained GLM."""
