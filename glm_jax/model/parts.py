"""The parts of a model by name: which params, of which layers, a pattern stands for.

A pattern is the beginning of a param's path, such as `embedding`, `final_norm` or `blocks/attention/qkv/kernel`; `*`
stands for any name. After `blocks` may stand a layer or a range of layers, from 0 and including the last:
`blocks/3`, `blocks/0..9/feedforward`.
"""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Sequence

import jax
import numpy as np

from glm_jax.config.model import GLMConfig
from glm_jax.errors import UserError
from glm_jax.model.transformer import shapes

Path = tuple[str, ...]  # of a param, such as ("blocks", "attention", "qkv", "kernel")

BLOCKS = "blocks"


def path_of(keys: Sequence[object]) -> Path:
    """Return jax's path of a leaf (`KeyPath`) as plain names."""
    return tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)


def select(patterns: Sequence[str], cfg: GLMConfig, key: str) -> dict[Path, np.ndarray]:
    """Return which params the patterns stand for, by path: bool [L] for params of blocks, bool [] for the others.

    Args:
        patterns: see the module's docstring.
        cfg: the model.
        key: the config key that holds the patterns, for messages.

    Raises:
        UserError: a pattern stands for nothing.
    """
    paths = [path_of(keys) for keys, _ in jax.tree_util.tree_leaves_with_path(shapes(cfg))]
    found = {path: np.zeros(cfg.num_layers if path[0] == BLOCKS else (), bool) for path in paths}
    for pattern in patterns:
        names, layers = _parse(pattern, cfg.num_layers)
        matching = [path for path in paths if _begins(path, names)]
        if not matching or not layers:
            kinds = ", ".join(dict.fromkeys("/".join(path[:2]) for path in paths))
            layered = f"{BLOCKS}/0..{cfg.num_layers - 1}"
            raise UserError(f"{key} names {pattern!r}, which is no part of this model: it has {kinds}, and {layered}")
        for path in matching:
            found[path][list(layers) if path[0] == BLOCKS else ...] = True
    return found


def _parse(pattern: str, count: int) -> tuple[list[str], range]:
    """Return the names of a pattern without its layers, and the layers; no layers if the model lacks one of them."""
    first, *rest = pattern.strip("/").split("/")
    numbers = re.fullmatch(r"(\d{1,9})(?:\.\.(\d{1,9}))?", rest[0]) if first == BLOCKS and rest else None
    if numbers is None:
        return [first, *rest], range(count)
    start, last = int(numbers[1]), int(numbers[2] or numbers[1])
    return [first, *rest[1:]], range(start, last + 1) if last < count else range(0)


def _begins(path: Path, names: Sequence[str]) -> bool:
    return len(names) <= len(path) and all(fnmatch.fnmatchcase(*pair) for pair in zip(path, names, strict=False))
