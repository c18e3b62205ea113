"""Small traced programs: what takes memory and what is moved and sent, by hand."""

from typing import Any

import jax
import jax.numpy as jnp
import pytest
from jax import lax

from glm_jax.planning import allocation, program
from glm_jax.planning.program import Program, Target

SIZE = 4 * 256 * 256  # bytes of a float32 matrix
X = jax.ShapeDtypeStruct((256, 256), "float32")


def read(function: Any, *shapes: jax.ShapeDtypeStruct, cpu: bool = False) -> Program:
    """Return a traced function as a program."""
    return program.read(jax.make_jaxpr(function)(*shapes).jaxpr, Target({"data": 2, "tensor": 4}, cpu))


def moved(function: Any, *shapes: jax.ShapeDtypeStruct) -> list[tuple[str, int]]:
    """Return the kernels of a function with the matrices' worth of bytes that they move."""
    return [(one.operation.kind, one.moved // SIZE) for one in program.kernels(read(function, *shapes))[0]]


def test_elementwise_work_is_one_kernel_with_its_only_reader() -> None:
    assert moved(lambda x: jnp.exp(x * 2 + 1), X) == [("exp", 2)]
    assert moved(lambda x: jnp.tanh(x).sum(), X) == [("reduce_sum", 1)]
    assert moved(lambda x: x @ (x + 1), X) == [("add", 2), ("dot_general", 3)]  # a product reads memory
    twice = moved(lambda x: (jnp.exp(x).sum(0), jnp.exp(x).sum(1)), X)
    assert twice == [("reduce_sum", 1), ("reduce_sum", 1)]
    shared = moved(lambda x: (y := jnp.exp(x)).sum(0) + y.sum(1), X)
    assert shared == [("exp", 2), ("reduce_sum", 1), ("reduce_sum", 1), ("add", 0)]


def test_what_nobody_reads_any_more_is_freed() -> None:
    assert allocation.peak_bytes(read(lambda x: jnp.exp(x @ x) @ x, X)) == 2 * SIZE
    assert allocation.peak_bytes(read(lambda x: (x @ x) @ (x @ x), X)) == 3 * SIZE


def test_accelerators_repeat_elementwise_work_where_cpus_keep_its_result() -> None:
    def shared(x: jax.Array) -> jax.Array:
        return (y := jnp.exp(x @ x)).sum(0) + y.sum(1)

    row = SIZE // 256
    assert allocation.peak_bytes(read(shared, X)) == SIZE + 2 * row  # the product, and two sums of its exponentials
    assert allocation.peak_bytes(read(shared, X, cpu=True)) == 2 * SIZE


def test_a_loop_updates_in_place_what_it_carries() -> None:
    rows = jax.ShapeDtypeStruct((16, 256, 256), "float32")

    def update(rows: jax.Array, x: jax.Array) -> jax.Array:
        return lax.fori_loop(0, 16, lambda i, rows: rows.at[i].set(rows[i] @ x), rows * 2)

    traced = read(update, rows, X)
    assert allocation.peak_bytes(traced) == pytest.approx(18 * SIZE, abs=100)  # with a slice and its product
    (loop,) = (one for one in traced.operations if one.bodies)
    assert allocation.turn_bytes(loop) == pytest.approx(2 * SIZE, abs=100)
    traced = read(lambda x: lax.fori_loop(0, 9, lambda _, y: (y @ x) @ x, x), X)
    assert allocation.peak_bytes(traced) == pytest.approx(2 * SIZE, abs=100)  # the second product lies where y was
    stacked = read(lambda rows: lax.scan(lambda x, row: (x @ row, x), jnp.ones_like(rows[0]), rows)[1], rows)
    # the stacked outputs, the carry, a row and the next carry
    assert allocation.peak_bytes(stacked) == pytest.approx(19 * SIZE, abs=100)


def test_products_count_two_for_a_multiply_add() -> None:
    shapes = jax.ShapeDtypeStruct((3, 4, 5), "float32"), jax.ShapeDtypeStruct((3, 5, 7), "float32")
    (one,) = read(lambda x, y: jnp.einsum("bij,bjk->bik", x, y), *shapes).operations
    assert one.flops == 2 * 3 * 4 * 5 * 7


def test_a_processor_multiplies_half_precision_as_float32() -> None:
    half = jax.ShapeDtypeStruct((256, 256), "float16")
    assert allocation.peak_bytes(read(lambda x: x @ x, half)) == SIZE // 2
    assert allocation.peak_bytes(read(lambda x: x @ x, half, cpu=True)) == SIZE // 2 + 3 * SIZE


@pytest.mark.parametrize(
    "collective, sent",
    [
        (lambda x: lax.psum(x, "tensor"), {"tensor": 2 * SIZE // 32 * 3 // 4}),
        (lambda x: lax.pmax(x, ("data", "tensor")), {"data+tensor": 2 * SIZE // 32 * 7 // 8}),
        (lambda x: lax.all_gather(x, "tensor", tiled=True), {"tensor": 3 * SIZE // 32}),
        (lambda x: lax.psum_scatter(x, "data", tiled=True), {"data": SIZE // 64}),
        (lambda x: lax.ppermute(x, "tensor", [(0, 1), (1, 0)]), {"tensor": SIZE // 32}),
        (lambda x: lax.psum(x, "pipeline"), {}),
    ],
)
def test_what_a_member_of_a_collective_sends(collective: Any, sent: dict[str, int]) -> None:
    sizes, auto = {"data": 2, "pipeline": 1, "tensor": 4}, (jax.sharding.AxisType.Auto,) * 3
    mesh: Any = jax.sharding.AbstractMesh(tuple(sizes.values()), tuple(sizes), axis_types=auto)
    whole = jax.P(("data", "pipeline", "tensor"))
    shape = jax.ShapeDtypeStruct((256, 64), "float32")  # 32 x 64 on each device
    mapped = jax.shard_map(collective, mesh=mesh, in_specs=whole, out_specs=whole, check_vma=False)
    (equation,) = jax.make_jaxpr(mapped)(shape).jaxpr.eqns
    operations = program.read(equation.params["jaxpr"], Target(sizes, cpu=False)).operations
    assert [one.sent for one in operations] == [sent]
