"""AdamW on the mean gradient, clipped by its global norm (paper appendix B, table 11); or any optax optimizer."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from glm_jax.config.training import OptimizerConfig
from glm_jax.types import Tree

Array = jax.Array
Optimizer = OptimizerConfig | optax.GradientTransformation


def decays(params: Tree) -> Tree:
    """Return which params decay: kernels and the embedding, but not scales and biases."""
    return jax.tree_util.tree_map_with_path(lambda path, _: not path[-1].key.endswith(("scale", "bias")), params)


def transformation(cfg: Optimizer, multipliers: Tree | None = None) -> optax.GradientTransformation:
    """Return the transformation that keeps the moments: `cfg` itself, or for a config AdamW without the learning rate.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101. With `multipliers` (`groups.of_params`), params that are frozen as a
    whole have no moments.
    """
    if isinstance(cfg, optax.GradientTransformation):
        whole = cfg
    else:
        whole = optax.chain(
            optax.scale_by_adam(b1=cfg.beta1, b2=cfg.beta2, eps=cfg.epsilon),
            optax.add_decayed_weights(cfg.weight_decay, mask=decays),
        )
    if multipliers is None or all(factor.any() for factor in jax.tree.leaves(multipliers)):
        return whole
    return optax.masked(whole, jax.tree.map(lambda factor: bool(factor.any()), multipliers))


def update(
    cfg: Optimizer, gradients: Tree, moments: Tree, params: Tree, lr: ArrayLike, multipliers: Tree | None = None
) -> tuple[Tree, Tree, dict[str, Array]]:
    """Take one step: clip by global norm, then AdamW; or apply an optax transformation and nothing else.

    `multipliers` (`groups.of_params`) multiply the updates. What is frozen does not count in `grad_norm`, and keeps its
    bits.

    Returns:
        The new params, the new moments, and global norms: `grad_norm` before clipping, `param_norm` before the step,
        `update_norm` of the change.
    """
    if multipliers is not None:
        gradients = jax.tree.map(lambda factor, gradient: jnp.where(factor, gradient, 0), multipliers, gradients)
    norm, before = optax.tree.norm(gradients), optax.tree.norm(params)
    transform = transformation(cfg, multipliers)
    if isinstance(cfg, optax.GradientTransformation):
        updates, moments = transform.update(gradients, moments, params)
        updates = _multiplied(multipliers, updates)
        params = optax.apply_updates(params, updates)
    else:
        factor = jnp.minimum(1.0, cfg.clip_norm / (norm + 1e-6))
        gradients = jax.tree.map(lambda gradient: gradient * factor, gradients)
        directions, moments = transform.update(gradients, moments, params)
        updates = _multiplied(multipliers, jax.tree.map(lambda direction: lr * direction, directions))
        params = jax.tree.map(jnp.subtract, params, updates)
    return params, moments, {"grad_norm": norm, "param_norm": before, "update_norm": optax.tree.norm(updates)}


def _multiplied(multipliers: Tree | None, updates: Tree) -> Tree:
    if multipliers is None:
        return updates
    return jax.tree.map(lambda factor, update: jnp.where(factor, factor * update, 0), multipliers, updates)


LAYER_GROUPS = 4


def group_norms(gradients: Tree, layers: int) -> dict[str, Array]:
    """Return the norms of the gradients of the embedding, the final norm and up to four groups of layers.

    Those of frozen params count, too, and with adapters they are those of the whole kernels.

    Args:
        gradients: in the tree of params; blocks may be padded after the first `layers` layers.
        layers: L.

    Returns:
        `grad_norm/embedding`, `grad_norm/final_norm`, `grad_norm/blocks_<first>_<last>` with layers from 0.
    """
    squares = [jnp.square(leaf).sum(range(1, leaf.ndim)) for leaf in jax.tree.leaves(gradients["blocks"])]  # [L] each
    by_layer = jnp.stack(squares).sum(0)  # [L]
    norms = {f"grad_norm/{name}": optax.tree.norm(gradients[name]) for name in ("embedding", "final_norm")}
    groups = min(LAYER_GROUPS, layers)
    edges = [layers * group // groups for group in range(groups + 1)]
    for first, stop in zip(edges, edges[1:], strict=False):
        norms[f"grad_norm/blocks_{first}_{stop - 1}"] = jnp.sqrt(by_layer[first:stop].sum())
    return norms
