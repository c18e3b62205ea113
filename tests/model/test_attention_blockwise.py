"""Attention block by block against the dense core, and what it leaves out against the dense mask."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import GLMConfig, Visibility, attention_blockwise
from glm_jax.model.attention_core import attention_probabilities
from glm_jax.model.attention_cores import CORES, Name
from glm_jax.model.positions import position_terms
from tests.model.numpy_reference import block_mask

ROWS, LENGTH, HEADS, DIM = 4, 128, 3, 8
MODELS = {
    "rope": GLMConfig(2, HEADS * DIM, HEADS, 32, 64),
    "scaled": GLMConfig(2, HEADS * DIM, HEADS, 32, 64, score_scaling=True),
    "relaxed": GLMConfig(2, HEADS * DIM, HEADS, 32, 64, pb_relax=32.0),
    "alibi": GLMConfig(2, HEADS * DIM, HEADS, 32, 64, position="alibi"),
}


def packed(seed: int, rows: int = ROWS, length: int = LENGTH) -> tuple[Visibility, np.ndarray]:
    """Return rows of packed samples with padding at the end, and positions that repeat inside each target."""
    random = np.random.default_rng(seed)
    segments, context = np.zeros((rows, length), np.int32), np.zeros((rows, length), bool)
    positions = np.zeros((rows, length), np.int32)
    for row in range(rows):
        start, full = 0, length - int(random.integers(0, length // 4))
        while start < full:
            size = min(int(random.integers(4, length // 2)), full - start)
            divide = start + int(size * random.uniform(0.1, 0.9))
            segments[row, start : start + size] = segments[row].max() + 1
            context[row, start:divide] = True
            positions[row, start:divide] = np.arange(divide - start)
            positions[row, divide : start + size] = random.integers(0, divide - start + 1)
            start += size
    return Visibility(jnp.asarray(segments), jnp.asarray(context)), positions


@functools.partial(jax.jit, static_argnums=(0, 1))
def mixed_and_gradients(core: Name, cfg: GLMConfig, arrays: Any, visibility: Visibility, positions: Any) -> Any:
    """Return the mixed values of layer 2 of 4, and the gradients of queries, keys and values."""
    queries, keys, values, gradient = arrays
    terms = position_terms(cfg, positions, queries.dtype)

    def mix(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        layer, heads = jnp.int32(2), jnp.arange(HEADS)
        return CORES[core](cfg, queries, keys, values, visibility, terms.distance, layer, heads, None)

    mixed, pull = jax.vjp(mix, queries, keys, values)
    return mixed, pull(gradient)


@pytest.mark.parametrize("name", MODELS)
def test_equals_the_dense_core_forward_and_backward(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    with jax.enable_x64(True):
        visibility, positions = packed(seed=1)
        random = np.random.default_rng(2)
        shapes = [(ROWS, LENGTH, HEADS, DIM), *[(ROWS, HEADS, LENGTH, DIM)] * 2, (ROWS, LENGTH, HEADS, DIM)]
        arrays = tuple(3 * random.normal(size=shape) for shape in shapes)
        results = [
            mixed_and_gradients(core, MODELS[name], arrays, visibility, positions)
            for core in ("reference", "blockwise")
        ]
    for expected, result in zip(*map(jax.tree.leaves, results), strict=True):
        assert result.dtype == jnp.float64
        np.testing.assert_allclose(result, expected, rtol=0, atol=1e-12 * float(np.abs(np.asarray(expected)).max()))


@pytest.mark.parametrize("dtype, tolerance", [("float16", 4e-3), ("bfloat16", 3e-2)])
def test_half_precision_differs_by_rounding_alone(
    dtype: str, tolerance: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    visibility, positions = packed(seed=3)
    random = np.random.default_rng(4)
    shapes = [(ROWS, LENGTH, HEADS, DIM), *[(ROWS, HEADS, LENGTH, DIM)] * 2, (ROWS, LENGTH, HEADS, DIM)]
    arrays = tuple(jnp.asarray(random.normal(size=shape), dtype) for shape in shapes)
    wide = tuple(array.astype(jnp.float32) for array in arrays)
    expected = mixed_and_gradients("reference", MODELS["rope"], wide, visibility, positions)
    result = mixed_and_gradients("blockwise", MODELS["rope"], arrays, visibility, positions)
    for exact, rounded in zip(*map(jax.tree.leaves, (expected, result)), strict=True):
        assert rounded.dtype == jnp.dtype(dtype)
        largest = float(jnp.abs(exact).max())
        np.testing.assert_allclose(np.asarray(rounded, np.float32), exact, rtol=0, atol=tolerance * largest)


@pytest.mark.parametrize("seed", range(5))
def test_only_blocks_that_a_query_may_see_are_taken(seed: int) -> None:
    visibility, _ = packed(seed, rows=1)
    tokens = attention_blockwise._Tokens(visibility.segments, visibility.context, None)
    firsts, stops = map(np.asarray, attention_blockwise.visible_blocks(tokens, 16))
    dense = np.asarray(visibility.dense())[0].reshape(LENGTH // 16, 16, LENGTH // 16, 16).any((1, 3))
    np.testing.assert_array_equal(firsts, dense.argmax(1))
    last = np.array([np.flatnonzero(row)[-1] for row in dense])
    np.testing.assert_array_equal(stops, last + 1)


def test_what_no_query_may_see_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    segments = jnp.repeat(jnp.array([[1, 2]]), 64, axis=1)  # [1, 128]
    visibility = Visibility(segments, jnp.zeros_like(segments, bool))
    queries, values = jnp.ones((1, LENGTH, HEADS, DIM)), jnp.ones((1, HEADS, LENGTH, DIM))
    keys = values.at[:, :, 64:].set(jnp.nan)  # of the second sample
    rest = (visibility, None, jnp.int32(0), jnp.arange(HEADS), None)
    mixed = CORES["blockwise"](MODELS["rope"], queries, keys, values, *rest)
    assert np.isfinite(mixed[:, :64]).all() and np.isnan(mixed[:, 64:]).all()


def test_memory_does_not_grow_with_the_square_of_the_length() -> None:
    def temporaries(core: Name, length: int) -> int:
        shapes = [(1, length, HEADS, DIM), *[(1, HEADS, length, DIM)] * 2, (1, length, HEADS, DIM)]
        arrays = tuple(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes)
        visibility: Any = Visibility(jnp.ones((1, length), jnp.int32), jnp.zeros((1, length), bool))
        positions = jax.ShapeDtypeStruct((1, length), jnp.int32)
        lowered = mixed_and_gradients.lower(core, MODELS["rope"], arrays, visibility, positions)
        analysis = lowered.compile().memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes

    at_1024, at_4096 = (temporaries("blockwise", length) for length in (1024, 4096))
    assert at_4096 < 5 * at_1024
    assert at_4096 < 0.1 * temporaries("reference", 4096)


def keys_of_rows(seed: int, rows: int) -> jax.Array:
    return jax.random.split(jax.random.key(seed), rows)


def test_dropout_equals_the_dense_core_with_the_same_masks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    cfg, heads = dataclasses.replace(MODELS["alibi"], attention_dropout=0.3), jnp.arange(HEADS)
    with jax.enable_x64(True):
        visibility, positions = packed(seed=5)
        random, row_keys = np.random.default_rng(6), keys_of_rows(0, ROWS)
        shapes = [(ROWS, LENGTH, HEADS, DIM), *[(ROWS, HEADS, LENGTH, DIM)] * 2, (ROWS, LENGTH, HEADS, DIM)]
        *arrays, gradient = (jnp.asarray(3 * random.normal(size=shape)) for shape in shapes)
        apart = position_terms(cfg, jnp.asarray(positions), jnp.dtype("float64")).distance
        assert apart is not None

        rest = (jnp.int32(0), heads)

        def of_head(key: jax.Array, head: jax.Array) -> jax.Array:
            return block_mask(jax.random.fold_in(key, head), 0.3, LENGTH, 32)

        def dense(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            probabilities = attention_probabilities(cfg, queries, keys, visibility.dense(), apart.dense(), *rest)
            kept = jax.vmap(jax.vmap(of_head, (None, 0)), (0, None))(row_keys, heads)  # [B, N, S, S]
            return jnp.einsum("bnst,bntk->bsnk", probabilities * kept / 0.7, values)

        def blocks(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
            return CORES["blockwise"](cfg, queries, keys, values, visibility, apart, *rest, row_keys)

        @jax.jit
        def both() -> Any:
            results = [jax.vjp(core, *arrays) for core in (dense, blocks)]
            return [(mixed, pull(gradient)) for mixed, pull in results]

        for exact, found in zip(*map(jax.tree.leaves, both()), strict=True):
            np.testing.assert_allclose(found, exact, rtol=0, atol=1e-12 * np.abs(np.asarray(exact)).max())


def test_dropout_keeps_its_share_and_the_expectation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Queries of zeros weigh all keys alike, and values of one each show the weights."""
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    rows, rate = 3, 0.3
    cfg = GLMConfig(1, HEADS * LENGTH, HEADS, 8, 64, attention_dropout=rate)
    visibility = Visibility(jnp.ones((rows, LENGTH), jnp.int32), jnp.ones((rows, LENGTH), bool))
    values = jnp.broadcast_to(jnp.eye(LENGTH), (rows, HEADS, LENGTH, LENGTH))

    @jax.jit
    def weights(heads: jax.Array, keys: jax.Array) -> jax.Array:
        queries = jnp.zeros((rows, LENGTH, HEADS, LENGTH))
        return CORES["blockwise"](cfg, queries, values, values, visibility, None, jnp.int32(0), heads, keys)

    def kept(seed: int, heads: jax.Array) -> np.ndarray:
        """Return the weights in units of those without dropout, [B, N, S, T]."""
        return np.asarray(weights(heads, keys_of_rows(seed, rows))).swapaxes(1, 2) * LENGTH

    found = kept(0, jnp.arange(HEADS))
    np.testing.assert_allclose(found[found > 0], 1 / (1 - rate), rtol=1e-5)
    error = (rate * (1 - rate) / found.size) ** 0.5
    assert (found > 0).mean() == pytest.approx(1 - rate, abs=5 * error)
    assert found.mean() == pytest.approx(1, abs=5 * error / (1 - rate))
    blocks = [
        part.ravel() for head in found.reshape(-1, LENGTH, LENGTH)
        for half in np.split(head, LENGTH // 32) for part in np.split(half, LENGTH // 32, axis=1)
    ]  # fmt: skip
    correlation = np.corrcoef(np.array(blocks)) - np.eye(len(blocks))  # of all rows, heads and blocks
    assert np.abs(correlation).max() < 6 / 32  # standard errors of 1,024 entries; there are 10,296 pairs
    np.testing.assert_array_equal(found, kept(0, jnp.arange(HEADS)))
    assert (found > 0)[kept(1, jnp.arange(HEADS)) > 0].mean() < 0.75  # another key, another mask
    np.testing.assert_array_equal(found[:, 1], kept(0, jnp.array([1, 0, 2]))[:, 0])  # by a head's index in the model
