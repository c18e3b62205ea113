"""The experiment that plans are held against."""

import runpy
from pathlib import Path

from glm_jax.config import Config

FILE = Path(__file__).parents[2] / "experiments" / "glm_130b.py"


def glm_130b() -> Config:
    """Return the config of experiments/glm_130b.py, unresolved."""
    return runpy.run_path(str(FILE))["get_config"]()
