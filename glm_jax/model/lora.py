"""LoRA: low-rank adapters as a pure transformation of params (Hu et al., arXiv 2106.09685).

The adapter of a kernel W of blocks is a pair: `a` [L, inputs, r] and `b` [L, r, outputs]. The model with adapters is
the model with W + scale * a b in the place of W. As `b` begins at 0, it begins as the model without adapters.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Sequence
from typing import TypeVar

import jax
import jax.numpy as jnp

from glm_jax.config.model import GLMConfig
from glm_jax.config.training import Lora
from glm_jax.errors import UserError
from glm_jax.model import parts
from glm_jax.model.transformer import logical_axes, shapes
from glm_jax.types import Tree

Array = jax.Array
T = TypeVar("T")

KERNEL = "kernel"
HEADS = ("attention", "output", KERNEL)  # [L, N, K, D]: two axes of inputs, where the other kernels have one


def init(cfg: GLMConfig, lora: Lora, key: Array) -> Tree:
    """Make adapters for the kernels that `lora.targets` name.

    Args:
        cfg: the model.
        lora: the rank r and the targets.
        key: a jax key; an adapter's draws depend on it and on the kernel's path.

    Returns:
        The adapted kernels' part of the tree of params, with {"a": [L, inputs, r], "b": [L, r, outputs]}, float32, in
        the place of each. `a` is normal with variance 1 / inputs, `b` is 0.

    Raises:
        UserError: a target is no part of the model, or names no kernel of blocks.
    """

    def adapter(path: Sequence[str], kernel: jax.ShapeDtypeStruct) -> Tree:
        layers, inputs, outputs = _split(path, kernel.shape)
        own = jax.random.fold_in(key, zlib.crc32("/".join(path).encode()))
        a = jax.random.normal(own, (layers, *inputs, lora.rank), jnp.float32) / math.sqrt(math.prod(inputs))
        return {"a": a, "b": jnp.zeros((layers, lora.rank, *outputs), jnp.float32)}

    return _adapted(lora, cfg, shapes(cfg), adapter)


def adapter_axes(cfg: GLMConfig, lora: Lora) -> Tree:
    """Return the tree of `init` with a tuple of logical axis names in place of each array; r has none."""

    def adapter(path: Sequence[str], names: tuple[str | None, ...]) -> Tree:
        layers, inputs, outputs = _split(path, names)
        return {"a": (layers, *inputs, None), "b": (layers, None, *outputs)}

    return _adapted(lora, cfg, logical_axes(cfg), adapter)


def merge(params: Tree, adapters: Tree, scale: float) -> Tree:
    """Return params with W + scale * a b in place of each adapted kernel W.

    Args:
        params: of the model; blocks may be padded, as the adapters are then.
        adapters: as `init` returns them.
        scale: alpha / r.
    """

    def walk(path: tuple[str, ...], params: Tree, adapters: Tree) -> Tree:
        if path[-1:] == (KERNEL,):
            product = jax.vmap(lambda a, b: jnp.tensordot(a, b, 1))(adapters["a"], adapters["b"])
            return params + scale * product
        return {
            name: walk((*path, name), inner, adapters[name]) if name in adapters else inner
            for name, inner in params.items()
        }

    return walk((), params, adapters)


def _adapted(lora: Lora, cfg: GLMConfig, params: Tree, adapter: Callable[[Sequence[str], Tree], Tree]) -> Tree:
    """Return what `adapter` makes of the path and the leaf of each kernel that the targets name, as a nested tree."""
    chosen = parts.select(lora.targets, cfg, "train.lora.targets")

    def walk(path: tuple[str, ...], node: Tree) -> Tree:
        if path[-1:] == (KERNEL,):
            layers = chosen[path]
            if layers.any() != layers.all():
                raise UserError("train.lora.targets names some layers of a kernel: an adapter is for all of them")
            return adapter(path, node) if layers.all() else {}
        if not isinstance(node, dict):
            return {}
        found = {name: walk((*path, name), inner) for name, inner in node.items()}
        return {name: inner for name, inner in found.items() if inner}

    found = walk((), {parts.BLOCKS: params[parts.BLOCKS]})
    if not found:
        raise UserError(f"train.lora.targets is {lora.targets!r}, which names no kernel: name one, such as 'blocks'")
    return found


def _split(path: Sequence[str], axes: Sequence[T]) -> tuple[T, tuple[T, ...], tuple[T, ...]]:
    """Split the axes of a kernel of blocks into its layers, its inputs and its outputs."""
    inputs = 2 if tuple(path[-3:]) == HEADS else 1
    return axes[0], tuple(axes[1 : 1 + inputs]), tuple(axes[1 + inputs :])
