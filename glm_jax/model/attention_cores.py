"""The attention cores by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from glm_jax.config.model import GLMConfig
from glm_jax.model.attention_blockwise import block_size, blockwise
from glm_jax.model.attention_core import Core, reference

Name = Literal["reference", "blockwise"]
CORES: Mapping[Name, Core] = {"reference": reference, "blockwise": blockwise}


def choose(cfg: GLMConfig, platform: str, length: int) -> Name:
    """Return the core for training on rows of `length` on a platform of jax, such as `cpu`.

    `blockwise` is for CPUs, where its loops of small products are the fastest; it has no dropout of probabilities.
    """
    possible = block_size(length) is not None and not cfg.attention_dropout
    return "blockwise" if platform == "cpu" and possible else "reference"
