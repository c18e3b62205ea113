"""GLM-130B's optimizer step as shapes: the paper's model, batch and optimizer (table 11), for compile_130b.py."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp

from glm_jax import model
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh, partition
from glm_jax.training import engine, optimizer, precision
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.precision import Precision

CONFIG = engine.EngineConfig(
    GLMConfig(num_layers=70, hidden_size=12288, num_heads=96, ffn_size=32768, vocab_size=150528),
    num_tokens=150344,
    objectives=3,
    compute="float16",
    normalization="microbatch",
)

build_mesh = mesh.build


def step(cfg: engine.EngineConfig, grid: jax.sharding.Mesh, state: Any, batch: Any) -> Any:
    """Take one optimizer step: gradients, clipping, AdamW, loss scale; skip it when a gradient is not finite."""
    params, moments, scale, samples = state
    key = jax.random.fold_in(jax.random.key(0), samples)
    gradients, sums, _ = engine.value_and_grad(cfg, grid, params, batch, key, 0.1, scale.scale)
    constants = OptimizerConfig()
    new, new_moments, norms = optimizer.update(
        constants, gradients, moments, params, optimizer.learning_rate(constants, samples)
    )
    finite = jnp.isfinite(norms["grad_norm"])
    params, moments = jax.tree.map(lambda new, old: jnp.where(finite, new, old), (new, new_moments), (params, moments))
    scale = precision.next_loss_scale(Precision("float16"), scale, finite)
    return (params, moments, scale, samples + 1), (sums, norms)


def lower(cfg: engine.EngineConfig, grid: jax.sharding.Mesh, microbatches: int, length: int) -> Any:
    """Lower the step from shapes, with one row a microbatch and data member."""
    glm, axes = cfg.model, model.logical_axes(cfg.model)
    specs = engine.state_specs(glm, grid)

    def start() -> Any:
        params = partition.pad_layers(model.init(glm, jax.random.key(0)), axes, grid.shape["pipeline"])
        moments = optimizer.transformation(OptimizerConfig()).init(params)
        return params, moments, precision.initial_loss_scale(Precision("float16")), jnp.int32(0)

    shapes = jax.eval_shape(start)
    structure = jax.tree.structure(shapes[0])
    laid = jax.tree.map(
        lambda part: specs if jax.tree.structure(part) == structure else jax.P(),
        shapes,
        is_leaf=lambda part: jax.tree.structure(part) == structure,
    )
    shardings = partition.shardings(grid, laid)
    state = jax.tree.map(lambda leaf, place: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=place),
                         shapes, shardings)  # fmt: skip
    rows = (microbatches, grid.shape["data"])
    kinds = {"tokens": "i4", "targets": "i4", "positions": "i4", "segments": "i4", "context": "?", "loss_mask": "f4"}
    batch = {name: jax.ShapeDtypeStruct((*rows, length), dtype) for name, dtype in kinds.items()}
    batch["objective"] = jax.ShapeDtypeStruct(rows, "i4")
    batch = {name: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype,
                                        sharding=jax.NamedSharding(grid, partition.batch_spec(len(leaf.shape))))
             for name, leaf in batch.items()}  # fmt: skip
    whole = jax.NamedSharding(grid, jax.P())
    stepped = jax.jit(
        lambda state, batch: step(cfg, grid, state, batch), donate_argnums=0, out_shardings=(shardings, whole)
    )
    return stepped.lower(state, batch)
