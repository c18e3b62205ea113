"""The examples in the docstrings of pure functions."""

import doctest
import importlib

import pytest

MODULES = {
    "glm_jax.parallel.pipeline.schedule": 2, "glm_jax.data.rows.mixture": 6, "glm_jax.model.residual": 2,
    "glm_jax.model.positions": 2, "glm_jax.parallel.partition": 1,
}  # fmt: skip


@pytest.mark.parametrize("name", MODULES)
def test_examples(name: str) -> None:
    result = doctest.testmod(importlib.import_module(name))
    assert result.failed == 0 and result.attempted == MODULES[name]
