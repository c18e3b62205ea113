"""Sums in half precision runs: over microbatches, over `data` and in metrics, none is in the compute dtype.

bfloat16 has 8 significant bits, so 256 + 1 is 256: one term of 256 swallows any number of ones after it.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from glm_jax import model
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import bind, passes
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh, partition, zero
from glm_jax.parallel.pipeline import run, schedule
from glm_jax.parallel.pipeline.stage import Functions, Keep, Weights
from tests.model import numpy_reference

GLM = GLMConfig(3, 16, 2, 16, 16, max_length=16, attention_dropout=0.1, hidden_dropout=0.1)
HALF = bind.EngineConfig(GLM, 16, 3, compute="bfloat16")
ROWS, LENGTH = 64, 16
REDUCTIONS = ("psum", "psum_invariant", "reduce_scatter", "psum_scatter", "pmax", "pmin")


@pytest.mark.parametrize("keep", ["layer", "stage", "all"])
@pytest.mark.parametrize("name", ["1f1b", "gpipe"])
def test_microbatches_are_added_up_in_float32(keep: Keep, name: str) -> None:
    """For loss = v e w1 w2 h with e = w1 = w2 = h = 1, every gradient is v, and so is every activation."""
    one = jnp.ones((), jnp.bfloat16)
    weights = Weights({"e": one, "h": one}, {"w": jnp.ones(2, jnp.bfloat16)})
    batch = {"v": jnp.asarray([256.0, 129.0] + [1.0] * (ROWS - 2), jnp.bfloat16)[:, None]}  # [M, 1]

    def head(outer: Any, x: jax.Array, batch: Any) -> tuple[jax.Array, jax.Array]:
        loss = (x * outer["h"]).astype(jnp.float32).sum()
        return loss, loss

    functions = Functions(
        prepare=lambda batch: (),
        embed=lambda outer, batch: outer["e"] * batch["v"],
        block=lambda weights, x, terms, layer: x * weights["w"],
        head=head,
    )

    def local(weights: Weights, batch: Any) -> Any:
        table = schedule.build(name, 1, ROWS)
        result = run.value_and_grad(functions, table, weights, batch, 2, keep, jnp.float32(1))
        return jax.tree.map(lambda array: lax.psum(array, mesh.AXES), result)

    grid = mesh.build({"data": 1, "pipeline": 1, "tensor": 1})
    result = jax.jit(jax.shard_map(local, mesh=grid, in_specs=jax.P(), out_specs=jax.P()))(weights, batch)
    whole = 256 + 129 + ROWS - 2
    assert {leaf.dtype for leaf in jax.tree.leaves(result.gradients)} == {jnp.dtype("float32")}
    assert [result.gradients.outer["e"], result.gradients.outer["h"], result.metrics] == [whole] * 3
    assert result.gradients.blocks["w"].tolist() == [whole] * 2
    assert result.measures.squares.tolist() == [256**2 + 129**2 + ROWS - 2] * 2  # 129^2 takes 15 bits
    assert result.executed.tolist() == [2 * ROWS, 2 * ROWS]


def test_a_gathered_layer_adds_up_members_gradients_in_float32() -> None:
    """Four members of `data` whose gradients are 256 and three ones; each holds a quarter of the weights."""
    members = jnp.asarray([256.0, 1.0, 1.0, 1.0], jnp.bfloat16)
    shards = jnp.arange(32.0).reshape(4, 4, 2)  # [data, D / data, F]

    def loss(shard: jax.Array, size: jax.Array) -> jax.Array:
        specs = {"kernel": jax.P("pipeline", "data", "tensor")}
        weights = zero.gather_layer({"kernel": shard}, specs, "bfloat16")["kernel"]  # [D, F]
        assert weights.dtype == jnp.bfloat16 and weights.shape == (16, 2)
        return (weights * size).astype(jnp.float32).sum()

    gradients = jax.vmap(jax.grad(loss), axis_name="data")(shards, members)
    assert gradients.dtype == jnp.float32
    np.testing.assert_array_equal(gradients, np.full((4, 4, 2), 259.0))


def equations(jaxpr: Any) -> Iterator[Any]:
    """Yield the equations of a traced program, including those inside loops."""
    for equation in jaxpr.eqns:
        yield equation
        for value in jax.tree.leaves(list(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, "eqns")):
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                yield from equations(inner)


def make_batch() -> Rows[np.ndarray]:
    """Make rows that are all targets except the first token, and one target fewer, so that their count is odd."""
    draw, places = np.random.default_rng(0), np.broadcast_to(np.arange(LENGTH, dtype=np.int32), (ROWS, LENGTH))
    tokens, targets = draw.integers(0, 16, (2, ROWS, LENGTH)).astype(np.int32)
    loss_mask = (places > 0).astype(np.float32)
    loss_mask[5, 7] = 0
    nothing = np.zeros(ROWS, np.int32)
    return Rows(tokens, targets, places, np.ones_like(places), places == 0, loss_mask, nothing, nothing)


@pytest.mark.parametrize("stage, shape", [(1, (2, 2, 2)), (3, (2, 1, 2))])
def test_no_reduction_over_data_is_in_the_compute_dtype(stage: Any, shape: tuple[int, ...]) -> None:
    cfg, axes = dataclasses.replace(HALF, zero=stage), model.logical_axes(GLM)
    grid: Any = jax.sharding.AbstractMesh(shape, mesh.AXES, axis_types=(jax.sharding.AxisType.Auto,) * 3)
    params = jax.eval_shape(lambda: partition.pad_layers(model.init(GLM, jax.random.key(0)), axes, shape[1]))
    batch = jax.tree.map(lambda array: array.reshape(4, 16, *array.shape[1:]), make_batch())
    shapes = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), batch)
    pass_over = lambda params, batch: passes.value_and_grad(cfg, grid, params, batch, jax.random.key(0))  # noqa: E731
    reductions, halves = [], 0
    for equation in equations(jax.make_jaxpr(pass_over)(params, shapes).jaxpr):
        over = equation.params.get("axes", equation.params.get("axis_name", ()))
        if "data" in over and equation.primitive.name in REDUCTIONS:
            reductions.append(equation)
        gathers = "data" in over and equation.primitive.name == "all_gather"
        halves += gathers and equation.invars[0].aval.dtype == "bfloat16"
    assert halves and {str(equation.invars[0].aval.dtype) for equation in reductions} == {"float32"}
    scattered = [equation for equation in reductions if "scatter" in equation.primitive.name]
    assert len(scattered) == 13  # one for each array, except the biases of qkv and of the up projection


@pytest.mark.slow
@pytest.mark.oldest
def test_metrics_of_many_microbatches_lose_no_target() -> None:
    grid, batch = mesh.build({"data": 1, "pipeline": 1, "tensor": 1}), make_batch()
    params, parts = jax.jit(lambda: model.init(GLM, jax.random.key(0)))(), mesh.place(grid, batch, ROWS)
    got = jax.jit(lambda params: passes.value_and_grad(HALF, grid, params, parts))(params)
    assert got.sums.targets.tolist() == [ROWS * (LENGTH - 1) - 1, 0, 0]
    causal = np.tril(np.ones((ROWS, LENGTH, LENGTH), bool))
    wide = jax.tree.map(lambda array: np.asarray(array, np.float64), params)
    logits = numpy_reference.forward(GLM, wide, batch.tokens, batch.positions, causal)  # [B, S, V]
    chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]  # [B, S]
    losses = (np.log(np.exp(logits).sum(-1)) - chosen) * batch.loss_mask
    assert got.sums.loss[0] == pytest.approx(losses.sum(), rel=5e-4)  # the rounding of the activations alone
    leaves = jax.tree.leaves((got.gradients, got.sums, got.activation_rms))
    assert {leaf.dtype for leaf in leaves} == {jnp.dtype("float32")}
