"""Prompts with answers: data sets, templates, samples."""
