"""Parameters, and floating-point operations of a token, counted from the architecture."""

from __future__ import annotations

import dataclasses
import math
from collections import Counter

import jax

from glm_jax.config.model import GLMConfig
from glm_jax.engine.bind import EngineConfig
from glm_jax.engine.meter import RECOMPUTED
from glm_jax.model import parts, shapes


@dataclasses.dataclass(frozen=True)
class Flops:
    """Floating-point operations of the products for one token of a training step."""

    model: float  # forward, and a backward of twice its work (MFU counts these)
    hardware: float  # with what the backward pass computes again (HFU counts these)
    published: float  # `hardware` by the formula of GLM-130B's training code, 4 passes, or 3 without recomputation


def parameters(glm: GLMConfig) -> dict[str, int]:
    """Return the number of parameters by part, such as `blocks/attention`; the tied embedding counts once."""
    found: Counter[str] = Counter()
    for keys, leaf in jax.tree_util.tree_leaves_with_path(shapes(glm)):
        path = parts.path_of(keys)
        found["/".join(path[:2]) if path[0] == parts.BLOCKS else path[0]] += math.prod(leaf.shape)
    return dict(found)


def flops(cfg: EngineConfig, length: int) -> Flops:
    """Return the floating-point operations of a token in rows of `length` tokens.

    A block is computed again as often as `meter.RECOMPUTED` says, to its end: compilers leave out its last product,
    whose result nobody reads. The whole score matrix counts, masked or not. Cores other than `reference`, and
    `products`, which keeps no scores, compute the scores (of queries and keys) once more in the backward pass.
    """
    glm = cfg.model
    row = glm.forward_flops(length)
    head = 2 * glm.hidden_size * glm.vocab_size * length
    scores = 2 * glm.num_layers * glm.hidden_size * length**2
    again = RECOMPUTED[cfg.keep] * (row - head)
    if cfg.attention != "reference" or cfg.keep == "products":
        again += scores
    published = glm.published_flops(length, 4 if RECOMPUTED[cfg.keep] else 3)
    return Flops(3 * row / length, (3 * row + again) / length, published / length)
