"""The memory that a training step takes on a device, part by part; nothing is compiled."""

from __future__ import annotations

import dataclasses
import math

import jax
import jax.numpy as jnp

from glm_jax import model
from glm_jax.config import Experiment
from glm_jax.model import attention_blockwise
from glm_jax.parallel import cross_entropy, partition
from glm_jax.planning import layout
from glm_jax.planning.allocation import peak_bytes, turn_bytes
from glm_jax.planning.tracing import Mesh, Pass, batch_shapes, model_shapes
from glm_jax.training.state import StepConfig
from glm_jax.types import Tree


@dataclasses.dataclass(frozen=True)
class Memory:
    """Bytes on each device. The parts from `params` to `work` add up to `total`, the peak of a step.

    The total is within a tenth of what XLA's compiler says for nearly all of the grid of tests/proofs/plan_grid.py, in
    float32 on CPUs with jax 0.12, and for GLM-130B on A100s and CPUs; where activations alone fill the memory it may be
    a third too low. Buffers of communication libraries are not included.
    """

    params: int  # float32 master params, this device's share; with LoRA adapters and base
    moments: int  # of the optimizer
    rows: int  # the batch
    weights: int  # params in the compute dtype, gathered over `data`; 0 if the master params are used as they are
    gradients: int  # float32 sums
    stash: int  # what forward slots keep for backward slots
    messages: int  # outputs that await the head, and what is sent between stages
    work: int  # of the slot that needs most: weights and sums of a layer, what its vjp holds
    total: int
    of_layer: int  # work of a block's backward slot
    of_head: int  # work of the head
    logits: int  # in the work of the head: float32 logits of a slice of the tokens
    attention: int  # in the work of a layer: float32 scores that one call of the attention core holds


def memory(experiment: Experiment, cfg: StepConfig, mesh: Mesh, traced: Pass) -> Memory:
    """Return the memory of a step of an experiment.

    Args:
        experiment: resolved.
        cfg, mesh: of `tracing.bind`.
        traced: of `tracing.trace`.
    """
    sizes = dict(mesh.shape)
    state = layout.of_step(cfg, mesh)
    rows = batch_shapes(experiment)
    of_rows = _held(rows, jax.tree.map(lambda array: partition.batch_spec(array.ndim), rows), mesh)
    carried = [value.size for value in traced.tick.inputs[traced.tick.constants :][: traced.tick.carried]]
    stash = carried[3 : len(carried) - traced.params - len(REST) - cfg.engine.attention_scores]
    gradients = carried[3 + len(stash) :][: traced.params]
    parts = {
        "params": state.bytes("params", layout.BASE),
        "moments": state.bytes("moments", "loss_scale"),
        "rows": of_rows,
        "weights": _weights(cfg, mesh),
        "gradients": sum(gradients),
        "stash": sum(stash),
        "messages": sum(carried[:3]),
    }
    temporary = max(peak_bytes(traced.program), parts["gradients"] + parts["stash"] + parts["weights"])
    if cfg.lora is not None:
        parts["weights"] += (merged := _held(model_shapes(cfg, mesh), _specs(cfg, mesh, state=True), mesh))
        temporary += merged
    work = temporary - sum(parts[name] for name in ("weights", "gradients", "stash", "messages"))
    total = sum(parts.values()) + max(work, 0)
    tokens = rows.tokens.shape[1] // sizes["data"] * rows.tokens.shape[2]
    return Memory(
        **parts,
        work=max(work, 0),
        total=total,
        of_layer=turn_bytes(traced.backward),
        of_head=turn_bytes(traced.head),
        logits=_logits(cfg, mesh, tokens),
        attention=_scores(cfg, mesh, rows.tokens.shape[1] // sizes["data"], rows.tokens.shape[2]),
    )


REST = ("loss", "targets", "squares", "executed")  # what a tick carries after the gradients


def _held(shapes: Tree, specs: Tree, mesh: Mesh) -> int:
    return sum(part.bytes for part in partition.parts(shapes, specs, dict(mesh.shape)))


def _specs(cfg: StepConfig, mesh: Mesh, *, state: bool) -> Tree:
    axes = model.logical_axes(cfg.engine.model)
    hidden = cfg.engine.model.hidden_size
    return partition.state_specs(axes, hidden, mesh.shape["data"]) if state else partition.specs(axes)


def _weights(cfg: StepConfig, mesh: Mesh) -> int:
    """Return the bytes of the weights that a pass makes from its shards of the params."""
    if mesh.shape["data"] == 1 and cfg.engine.compute == "float32":
        return 0
    dtype = jnp.dtype(cfg.engine.compute)
    shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, dtype), model_shapes(cfg, mesh))
    specs = _specs(cfg, mesh, state=False)
    if cfg.engine.zero == 3:  # blocks are gathered one at a time
        del shapes["blocks"], specs["blocks"]
    return _held(shapes, specs, mesh)


def _logits(cfg: StepConfig, mesh: Mesh, tokens: int) -> int:
    vocabulary = cfg.engine.model.vocab_size // (mesh.shape["pipeline"] * mesh.shape["tensor"])
    slices = math.ceil(tokens / max(cross_entropy.SMALLEST, cross_entropy.LOGITS // vocabulary))
    return 4 * math.ceil(tokens / slices) * vocabulary


def _scores(cfg: StepConfig, mesh: Mesh, rows: int, length: int) -> int:
    heads = cfg.engine.model.num_heads // mesh.shape["tensor"]
    if cfg.engine.attention == "reference":
        return 4 * rows * heads * length**2
    if cfg.engine.attention == "blockwise":
        together = math.gcd(rows, max(1, attention_blockwise.HEADS // heads))
        return 4 * together * heads * (attention_blockwise.block_size(length) or length) ** 2
    return 0  # a fused kernel keeps them in the processors' own memory
