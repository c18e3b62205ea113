"""AdamW on the mean gradient, clipped by its global norm (paper appendix B, table 11); or any optax optimizer."""

from __future__ import annotations

from typing import NamedTuple

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


def transformation(
    cfg: Optimizer, multipliers: Tree | None = None, steps: ArrayLike = True
) -> optax.GradientTransformation:
    """Return the transformation that keeps the moments: `cfg` itself, or for a config AdamW without the learning rate.

    AdamW: Loshchilov and Hutter, arXiv 1711.05101. With `multipliers` (`groups.of_params`), params that are frozen as a
    whole have no moments. Unless AdamW `steps`, bool [], gradients of 0 leave its means as they are, to the bit.
    """
    if isinstance(cfg, optax.GradientTransformation):
        whole = cfg
    else:
        beta1, beta2 = (jnp.where(steps, beta, 1.0) for beta in (cfg.beta1, cfg.beta2))
        whole = optax.chain(
            optax.scale_by_adam(b1=beta1, b2=beta2, eps=cfg.epsilon),
            optax.add_decayed_weights(cfg.weight_decay, mask=decays),
        )
    if multipliers is None or all(factor.any() for factor in jax.tree.leaves(multipliers)):
        return whole
    return optax.masked(whole, jax.tree.map(lambda factor: bool(factor.any()), multipliers))


class Updated(NamedTuple):
    """What `update` returns."""

    params: Tree
    moments: Tree
    norms: dict[str, Array]  # `grad_norm` before clipping, `param_norm` before the step, `update_norm` of the change
    finite: Array  # bool []; if False, params and moments are as they were


def update(
    cfg: Optimizer, gradients: Tree, moments: Tree, params: Tree, lr: ArrayLike, multipliers: Tree | None = None
) -> Updated:
    """Take one step: clip by global norm, then AdamW; or apply an optax transformation and nothing else.

    `multipliers` (`groups.of_params`) multiply the updates. What is frozen does not count in `grad_norm`, and keeps its
    bits. A step is not taken if a gradient is not finite; nor, with an optax transformation, if its update is not.
    """
    if multipliers is not None:
        gradients = jax.tree.map(lambda factor, gradient: jnp.where(factor, gradient, 0), multipliers, gradients)
    norms = {"grad_norm": optax.tree.norm(gradients), "param_norm": optax.tree.norm(params)}
    # Norms first, or XLA copies what it then updates in place.
    gradients, moments, params, norms = jax.lax.optimization_barrier((gradients, moments, params, norms))
    if isinstance(cfg, optax.GradientTransformation):
        return _transform(cfg, gradients, moments, params, multipliers, norms)
    return _adamw(cfg, gradients, moments, params, lr, multipliers, norms)


def _adamw(
    cfg: OptimizerConfig, gradients: Tree, moments: Tree, params: Tree, lr: ArrayLike, multipliers: Tree | None,
    norms: dict[str, Array],
) -> Updated:  # fmt: skip
    # Choosing between old and new arrays at the end would need both in memory, and three more passes over them.
    finite = jnp.isfinite(norms["grad_norm"])
    factor = jnp.minimum(1.0, cfg.clip_norm / (norms["grad_norm"] + 1e-6))
    gradients = jax.tree.map(lambda gradient: jnp.where(finite, gradient * factor, 0), gradients)
    directions, new = transformation(cfg, multipliers, finite).update(gradients, moments, params)
    moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old) if new.ndim == 0 else new, new, moments)
    updates = _multiplied(multipliers, jax.tree.map(lambda direction: jnp.where(finite, lr * direction, 0), directions))
    params = jax.tree.map(jnp.subtract, params, updates)
    return Updated(params, moments, norms | {"update_norm": optax.tree.norm(updates)}, finite)


def _transform(
    cfg: optax.GradientTransformation, gradients: Tree, moments: Tree, params: Tree, multipliers: Tree | None,
    norms: dict[str, Array],
) -> Updated:  # fmt: skip
    updates, new = transformation(cfg, multipliers).update(gradients, moments, params)
    updates = _multiplied(multipliers, updates)
    norms = norms | {"update_norm": optax.tree.norm(updates)}
    finite = jnp.isfinite(norms["grad_norm"]) & jnp.isfinite(norms["update_norm"])
    chosen = (optax.apply_updates(params, updates), new), (params, moments)
    params, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), *chosen)
    return Updated(params, moments, norms, finite)


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
