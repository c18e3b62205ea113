"""The params of a workdir, as tests compare them."""

from pathlib import Path
from typing import Any

from glm_jax.interop import arrays
from glm_jax.interop.weights import open_weights


def stored(workdir: str | Path) -> Any:
    """Return the newest good params of a workdir, adapters merged into them."""
    return arrays.load(open_weights(workdir).parameters)
