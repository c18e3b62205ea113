"""AdamW in float64 numpy, written from the paper (Loshchilov and Hutter, arXiv 1711.05101, algorithm 2).

The optimizer is tested against it. The learning rate here is the paper's schedule multiplier, with alpha = 1. Gradients
are first clipped by their global norm (Pascanu et al., arXiv 1211.5063). Trees are flat dicts from paths to arrays.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
import numpy as np

Arrays = dict[str, np.ndarray]


class Moments(NamedTuple):
    """The number of steps taken, and both running means."""

    steps: int
    first: Arrays
    second: Arrays


def flat(tree: Any) -> Arrays:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(leaf, np.float64) for path, leaf in leaves
    }


def like(tree: Any, arrays: Arrays) -> Any:
    """Undo `flat`, in the tree's structure and dtypes."""
    return jax.tree.map(
        lambda leaf, array: np.asarray(array, leaf.dtype),
        tree,
        jax.tree.unflatten(jax.tree.structure(tree), arrays.values()),
    )


def start(params: Arrays) -> Moments:
    return Moments(0, *({name: np.zeros_like(array) for name, array in params.items()} for _ in range(2)))


def update(
    params: Arrays, gradients: Arrays, moments: Moments, lr: float, *, beta1: float, beta2: float, epsilon: float,
    weight_decay: float, clip_norm: float,
) -> tuple[Arrays, Moments]:  # fmt: skip
    norm = np.sqrt(sum(np.sum(gradient**2) for gradient in gradients.values()))
    count, first, second, moved = moments.steps + 1, {}, {}, {}
    for name, param in params.items():
        gradient = gradients[name] * min(1.0, clip_norm / (norm + 1e-6))  # 1e-6 as in torch and Megatron-LM
        first[name] = beta1 * moments.first[name] + (1 - beta1) * gradient
        second[name] = beta2 * moments.second[name] + (1 - beta2) * gradient**2
        direction = (first[name] / (1 - beta1**count)) / (np.sqrt(second[name] / (1 - beta2**count)) + epsilon)
        decayed = 0.0 if name.endswith(("scale", "bias")) else weight_decay * param
        moved[name] = param - lr * (direction + decayed)
    return moved, Moments(count, first, second)
