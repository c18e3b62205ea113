"""Prompts with answers: data sets, templates and samples."""
