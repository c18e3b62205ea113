"""Groups of params: which ones are frozen, and what multiplies the learning rate of each."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import numpy as np

from glm_jax.config import Experiment
from glm_jax.model import GLMConfig, parts
from glm_jax.types import Tree


@dataclass(frozen=True)
class Groups:
    """How params differ in training, hashable: train.freeze, optimizer.layer_decay and optimizer.multipliers."""

    frozen: tuple[str, ...] = ()
    layer_decay: float = 1.0
    multipliers: tuple[tuple[str, float], ...] = ()

    @classmethod
    def of(cls, config: Experiment) -> Groups:
        """Return the groups of an experiment."""
        return cls(config.train.freeze, config.optimizer.layer_decay, config.optimizer.multipliers)


def multipliers(groups: Groups, model: GLMConfig) -> dict[parts.Path, np.ndarray]:
    """Return what multiplies the learning rate of each param, by path: float32 [L] for blocks, [] for the others.

    With a layer decay d, layer l of L has d^(L - 1 - l), the final norm 1 and the embedding d^L (arXiv 1906.08237,
    appendix A.7). Where several multipliers name a param, they are multiplied. A frozen param has 0.

    Raises:
        UserError: a pattern is no part of the model.
    """
    decay, layers = groups.layer_decay, model.num_layers
    powers = {parts.BLOCKS: np.arange(layers - 1, -1, -1), "embedding": np.array(layers), "final_norm": np.array(0)}
    found = {path: np.float32(decay) ** powers[path[0]] for path in parts.select((), model, "")}
    named = [("train.freeze", pattern, 0.0) for pattern in groups.frozen]
    named += [("optimizer.multipliers", pattern, factor) for pattern, factor in groups.multipliers]
    for key, pattern, factor in named:
        for path, chosen in parts.select((pattern,), model, key).items():
            found[path] = np.where(chosen, found[path] * factor, found[path])
    return {path: np.asarray(factor, np.float32) for path, factor in found.items()}


def of_params(groups: Groups, model: GLMConfig, params: Tree) -> Tree | None:
    """Return the multipliers in the tree of params, to be multiplied with its arrays; None if all are 1.

    Params of blocks may be padded with layers, or be adapters of them.
    """
    if groups == Groups():
        return None
    by_path = multipliers(groups, model)

    def one(keys: tuple[object, ...], array: jax.Array) -> np.ndarray:
        path = parts.path_of(keys)
        factor = by_path[path] if path in by_path else by_path[path[:-1]]  # an adapter has its kernel's
        if factor.ndim:
            factor = np.pad(factor, (0, array.shape[0] - len(factor)))
        return factor.reshape(factor.shape + (1,) * (array.ndim - factor.ndim))

    return jax.tree_util.tree_map_with_path(one, params)
