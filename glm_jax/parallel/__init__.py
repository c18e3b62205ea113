"""Meshes and partition specs. Knows arrays and functions, not GLM."""
