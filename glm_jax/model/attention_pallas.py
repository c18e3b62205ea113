"""Attention as Pallas kernels for TPUs: block by block in fast memory, without keys that no query of a block may see.

jax's splash attention cannot be used inside a `shard_map` that checks which arrays vary over the mesh, and is made for
masks that are known before the data. These kernels are flash attention (arXiv 2205.14135) with the mask of a
`Visibility`. Scores lie transposed, keys before queries, so that what belongs to a query is a row.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

from glm_jax.config.model import GLMConfig
from glm_jax.model.layers import PRODUCT
from glm_jax.model.positions import Distance
from glm_jax.model.visibility import Visibility, spans

Array = jax.Array

BLOCKS = (512, 256, 128)  # queries, and keys, of a block: the first that divides the length
INTERPRET = False  # True runs the kernels on any platform, slowly


def block_size(length: int) -> int | None:
    """Return the tokens of a block for rows of `length`, or None if they do not divide into blocks."""
    return next((size for size in BLOCKS if length % size == 0), None)


def pallas(
    cfg: GLMConfig, queries: Array, keys: Array, values: Array, allowed: Array | Visibility,
    apart: Distance | None, layer: Array, heads: Array, dropout_keys: Array | None,
) -> Array:  # fmt: skip
    """Mix values by Pallas kernels; see `attention_core.Core`. `attention_cores.choose` says when this is possible.

    Products have float32 sums, so that `score_scaling` and `pb_relax`, which only keep numbers in range, do nothing.
    """
    assert isinstance(allowed, Visibility) and apart is None and block_size(queries.shape[1])
    queries = (queries / cfg.head_dim**0.5).astype(queries.dtype).swapaxes(1, 2)  # [B, N, S, K]
    arrays = _vary((queries, keys, values, 2 * allowed.segments + allowed.context, allowed))
    return _attend(*arrays).swapaxes(1, 2)  # [B, S, N, K]


def _vary(arrays: Any) -> Any:
    """Return arrays that all vary along the same mesh axes, as a kernel needs them."""
    leaves = jax.tree.leaves(arrays)
    axes = frozenset[str]().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in leaves))

    def cast(leaf: Array) -> Array:
        missing = tuple(axes - jax.typeof(leaf).manual_axis_type.varying)
        return lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, arrays)


@jax.custom_vjp
def _attend(queries: Array, keys: Array, values: Array, codes: Array, visibility: Visibility) -> Array:
    """Mix values [B, N, S, K] for scaled queries [B, N, S, K]; codes [B, S] are 2 * segment + context."""
    return _forward(queries, keys, values, codes, visibility)[0]


def _forward(
    queries: Array, keys: Array, values: Array, codes: Array, visibility: Visibility
) -> tuple[Array, tuple[Array | Visibility, ...]]:
    size, dim = block_size(queries.shape[2]) or 0, queries.shape[3]
    logs = jax.ShapeDtypeStruct((*queries.shape[:2], 1, queries.shape[2]), jnp.float32)  # [B, N, 1, S]
    mixed, logs = _call(
        functools.partial(_mix, size),
        spans(visibility.blocks(size)),
        [queries, codes[:, None, None]],
        [keys, values, codes[:, None, :, None]],
        [queries, logs],
        [(1, size), (1, size), (dim, size)],
    )
    mixed, logs = checkpoint_name(mixed, PRODUCT), checkpoint_name(logs, PRODUCT)
    return mixed, (queries, keys, values, codes, visibility, mixed, logs)


def _backward(kept: tuple[Any, ...], gradient: Array) -> tuple[Array | None, ...]:
    queries, keys, values, codes, visibility, mixed, logs = kept
    size, dim = block_size(queries.shape[2]) or 0, queries.shape[3]
    shift = jnp.sum(gradient.astype(jnp.float32) * mixed, -1)[:, :, None]  # [B, N, 1, S]
    of_queries = [queries, gradient, logs, shift, codes[:, None, None]]
    of_keys = [keys, values, codes[:, None, :, None]]
    seen = visibility.blocks(size)  # [B, queries' blocks, keys' blocks]
    (for_queries,) = _call(
        functools.partial(_gradient_of_queries, size), spans(seen), of_queries, of_keys, [queries], [(dim, size)]
    )
    for_keys, for_values = _call(
        functools.partial(_gradients_of_keys, size),
        spans(seen.swapaxes(1, 2)),
        of_keys,
        of_queries,
        [keys, values],
        [(size, dim), (size, dim)],
    )
    return for_queries, for_keys, for_values, None, None


_attend.defvjp(_forward, _backward)


def _call(
    kernel: Callable[..., None],
    span: tuple[Array, Array],
    outer: Sequence[Array],
    inner: Sequence[Array],
    outputs: Sequence[Array | jax.ShapeDtypeStruct],
    scratch: Sequence[tuple[int, int]],
) -> list[Array]:
    """Run a kernel for every row, head and block of `outer`, and in turn every block of `inner` in the block's span.

    Arrays are [B, N, S, K], or [B, N, 1, S], or [B, 1, 1, S] and [B, 1, S, 1] of all heads. The kernel gets the span
    (first and stop, int32 [B, S / size]), a block of each array and output, and float32 scratch of the given shapes.
    """
    from jax.experimental import pallas as pl  # here, because most commands have no use for them
    from jax.experimental.pallas import tpu as pltpu

    rows, heads, length, _ = outer[0].shape
    size, kind = block_size(length) or 0, jax.typeof(outer[0]).manual_axis_type

    def spec(shape: tuple[int, ...], is_inner: bool) -> pl.BlockSpec:
        lies = shape[2] == 1  # tokens along the last axis

        def place(b: Array, n: Array, i: Array, j: Array, firsts: Any, stops: Any) -> tuple[Array | int, ...]:
            head = n if shape[1] > 1 else 0
            # outside the span the block stays as it is, so that nothing is fetched
            block = jnp.clip(j, firsts[b, i], stops[b, i] - 1) if is_inner else i
            return (b, head, 0, block) if lies else (b, head, block, 0)

        return pl.BlockSpec((None, None, 1, size) if lies else (None, None, size, shape[3]), place)

    grid = pltpu.PrefetchScalarGridSpec(
        num_scalar_prefetch=2,
        grid=(rows, heads, length // size, length // size),
        in_specs=[spec(array.shape, False) for array in outer] + [spec(array.shape, True) for array in inner],
        out_specs=[spec(array.shape, False) for array in outputs],
        scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    )
    call = pl.pallas_call(
        kernel,
        [jax.ShapeDtypeStruct(array.shape, array.dtype, manual_axis_type=kind) for array in outputs],
        grid_spec=grid,
        compiler_params=pltpu.CompilerParams(dimension_semantics=("parallel",) * 3 + ("arbitrary",)),
        interpret=INTERPRET,
    )
    return call(*span, *outer, *inner)


def _steps(
    firsts: Any, stops: Any, start: Callable[[], None], more: Callable[[], None], end: Callable[[], None]
) -> None:
    """Run `start`, `more` and `end` in the first, each and the last turn of a block's span."""
    from jax.experimental import pallas as pl

    row, i, j = pl.program_id(0), pl.program_id(2), pl.program_id(3)
    first, stop = firsts[row, i], stops[row, i]
    pl.when(j == first)(start)
    pl.when((first <= j) & (j < stop))(more)
    pl.when(j == stop - 1)(end)


def _dot(left: Array, right: Array, axes: tuple[int, int]) -> Array:
    """Multiply, summing over an axis of each, in float32."""
    return lax.dot_general(left, right, (((axes[0],), (axes[1],)), ((), ())), preferred_element_type=jnp.float32)


def _scores(
    size: int, query: Any, query_code: Any, key: Any, key_code: Any, query_block: Array, key_block: Array
) -> Array:
    """Return float32 scores [T, Q], with the lowest number where a query may not see a key."""
    products = _dot(key[...], query[...], (1, 1))  # [T, Q]
    ahead = (query_block - key_block) * size  # of the first query before the first key
    key_place, query_place = (lax.broadcasted_iota(jnp.int32, (size, size), axis) for axis in (0, 1))
    queries, keys = query_code[...], key_code[...]  # [1, Q], [T, 1]
    allowed = (queries >> 1 == keys >> 1) & ((query_place + ahead >= key_place) | (keys & 1 == 1))  # [T, Q]
    return jnp.where(allowed, products, jnp.finfo(jnp.float32).min)


def _mix(
    size: int, firsts: Any, stops: Any, query: Any, query_code: Any, key: Any, value: Any, key_code: Any,
    mixed: Any, logs: Any, largest: Any, total: Any, sums: Any,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    blocks = pl.program_id(2), pl.program_id(3)

    def start() -> None:
        largest[...] = jnp.full_like(largest, jnp.finfo(jnp.float32).min)
        total[...] = jnp.zeros_like(total)
        sums[...] = jnp.zeros_like(sums)

    def more() -> None:
        scores = _scores(size, query, query_code, key, key_code, *blocks)  # [T, Q]
        larger = jnp.maximum(largest[...], scores.max(0, keepdims=True))  # [1, Q]
        probabilities, shrink = jnp.exp(scores - larger), jnp.exp(largest[...] - larger)
        largest[...] = larger
        total[...] = total[...] * shrink + probabilities.sum(0, keepdims=True)
        sums[...] = sums[...] * shrink + _dot(value[...], probabilities.astype(value.dtype), (0, 0))  # [K, Q]

    def end() -> None:
        mixed[...] = (sums[...] / total[...]).T.astype(mixed.dtype)
        logs[...] = largest[...] + jnp.log(total[...])

    _steps(firsts, stops, start, more, end)


def _gradient_of_scores(scores: Array, gradient: Any, logs: Any, shift: Any, value: Any) -> tuple[Array, Array]:
    """Return probabilities and the gradient of the products, both float32 [T, Q]."""
    probabilities = jnp.exp(scores - logs[...])
    return probabilities, probabilities * (_dot(value[...], gradient[...], (1, 1)) - shift[...])


def _gradient_of_queries(
    size: int, firsts: Any, stops: Any, query: Any, gradient: Any, logs: Any, shift: Any, query_code: Any,
    key: Any, value: Any, key_code: Any, result: Any, sums: Any,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    blocks = pl.program_id(2), pl.program_id(3)

    def start() -> None:
        sums[...] = jnp.zeros_like(sums)

    def more() -> None:
        scores = _scores(size, query, query_code, key, key_code, *blocks)  # [T, Q]
        _, products = _gradient_of_scores(scores, gradient, logs, shift, value)
        sums[...] += _dot(key[...], products.astype(key.dtype), (0, 0))  # [K, Q]

    def end() -> None:
        result[...] = sums[...].T.astype(result.dtype)

    _steps(firsts, stops, start, more, end)


def _gradients_of_keys(
    size: int, firsts: Any, stops: Any, key: Any, value: Any, key_code: Any,
    query: Any, gradient: Any, logs: Any, shift: Any, query_code: Any,
    for_key: Any, for_value: Any, key_sums: Any, value_sums: Any,
) -> None:  # fmt: skip
    from jax.experimental import pallas as pl

    blocks = pl.program_id(3), pl.program_id(2)

    def start() -> None:
        key_sums[...], value_sums[...] = jnp.zeros_like(key_sums), jnp.zeros_like(value_sums)

    def more() -> None:
        scores = _scores(size, query, query_code, key, key_code, *blocks)  # [T, Q]
        probabilities, products = _gradient_of_scores(scores, gradient, logs, shift, value)
        value_sums[...] += _dot(probabilities.astype(value.dtype), gradient[...], (1, 0))  # [T, K]
        key_sums[...] += _dot(products.astype(key.dtype), query[...], (1, 0))  # [T, K]

    def end() -> None:
        for_key[...], for_value[...] = key_sums[...].astype(for_key.dtype), value_sums[...].astype(for_value.dtype)

    _steps(firsts, stops, start, more, end)
