"""The fused kernels for GPUs and TPUs: compared with the dense core on a CPU, and lowered for their platforms.

No kernel runs on an accelerator here. Those for TPUs run in Pallas's interpret mode, which knows no `check_vma`, so
that on a mesh they are only lowered. cuDNN's call runs with jax's own products in the place of cuDNN's.
"""

import functools
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax._src.cudnn import fused_attention_stablehlo

from glm_jax.model import GLMConfig, Visibility, attention_blockwise, attention_cudnn, attention_pallas
from glm_jax.model.attention_cores import CORES, Name
from tests.model.test_attention_blockwise import packed

ROWS, LENGTH, HEADS, DIM = 2, 128, 2, 8
SIZES = (2, HEADS * DIM, HEADS, 32, 64)
MODELS = {
    "plain": GLMConfig(*SIZES),
    "scaled": GLMConfig(*SIZES, score_scaling=True),
    "relaxed": GLMConfig(*SIZES, pb_relax=32.0),
}
FUSED: tuple[Name, ...] = ("pallas", "cudnn")
TOLERANCES = {"float32": 1e-6, "bfloat16": 3e-2}


def emulate(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let all cores run on a CPU, in small blocks."""
    monkeypatch.setattr(attention_blockwise, "BLOCK", 32)
    monkeypatch.setattr(attention_pallas, "BLOCKS", (32,))
    monkeypatch.setattr(attention_pallas, "INTERPRET", True)
    monkeypatch.setattr(attention_cudnn, "IMPLEMENTATION", "xla")


def mixed_and_gradients(core: Name, cfg: GLMConfig, arrays: Any, visibility: Visibility) -> Any:
    """Return the mixed values of layer 2 of 4, and the gradients of queries, keys and values."""
    queries, keys, values, gradient = arrays
    heads = jnp.arange(queries.shape[2])

    def mix(queries: jax.Array, keys: jax.Array, values: jax.Array) -> jax.Array:
        return CORES[core](cfg, queries, keys, values, visibility, None, jnp.int32(2), heads, None)

    mixed, pull = jax.vjp(mix, queries, keys, values)
    return mixed, pull(gradient)


def shapes(rows: int, length: int, heads: int, dim: int) -> list[tuple[int, ...]]:
    by_token, by_head = (rows, length, heads, dim), (rows, heads, length, dim)
    return [by_token, by_head, by_head, by_token]


@pytest.mark.parametrize("name, dtype", [*((name, "float32") for name in MODELS), ("plain", "bfloat16")])
@pytest.mark.parametrize("core", FUSED)
def test_equals_the_dense_core_forward_and_backward(
    core: Name, name: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    emulate(monkeypatch)
    visibility, _ = packed(seed=1, rows=ROWS, length=LENGTH)
    random = np.random.default_rng(2)
    arrays = [jnp.asarray(2 * random.normal(size=shape), dtype) for shape in shapes(ROWS, LENGTH, HEADS, DIM)]
    wide = [array.astype(jnp.float32) for array in arrays]
    run = jax.jit(mixed_and_gradients, static_argnums=(0, 1))
    expected = run("reference", MODELS[name], wide, visibility)
    result = run(core, MODELS[name], arrays, visibility)
    for exact, found in zip(*map(jax.tree.leaves, (expected, result)), strict=True):
        assert found.dtype == dtype
        atol = TOLERANCES[dtype] * float(jnp.abs(exact).max())
        np.testing.assert_allclose(np.asarray(found, np.float32), exact, rtol=0, atol=atol)


def test_what_no_query_may_see_is_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    segments = jnp.repeat(jnp.array([[1, 2]]), LENGTH // 2, axis=1)  # [1, S]
    visibility = Visibility(segments, jnp.zeros_like(segments, bool))
    arrays = [jnp.ones(shape) for shape in shapes(1, LENGTH, HEADS, DIM)]
    for place in (1, 2):
        arrays[place] = arrays[place].at[:, :, LENGTH // 2 :].set(jnp.nan)  # keys and values of the second sample
    mixed, (for_queries, for_keys, for_values) = mixed_and_gradients("pallas", MODELS["plain"], arrays, visibility)
    half = LENGTH // 2
    for result in (mixed, for_queries, for_keys.swapaxes(1, 2), for_values.swapaxes(1, 2)):
        assert np.isfinite(result[:, :half]).all()
    assert np.isnan(mixed[:, half:]).all()


def lowered(core: Name, platform: str, dim: int) -> str:
    """Return the program of forward and backward pass on a mesh that splits rows and heads."""
    rows, length, heads = 4, 512, 4
    cfg = GLMConfig(1, heads * dim, heads, 32, 64, score_scaling=True)
    arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in shapes(rows, length, heads, dim)]
    tokens: list[Any] = [jax.ShapeDtypeStruct((rows, length), dtype) for dtype in (jnp.int32, jnp.bool)]
    mesh = jax.sharding.AbstractMesh((2, 2), ("data", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 2)
    by_token, by_head = jax.P("data", None, "tensor"), jax.P("data", "tensor")
    specs = [by_token, by_head, by_head, by_token]
    mapped = jax.shard_map(
        functools.partial(mixed_and_gradients, core, cfg), mesh=mesh, in_specs=(specs, jax.P("data")),
        out_specs=(by_token, tuple(specs[:3])), check_vma=True,
    )  # fmt: skip
    return jax.jit(mapped).trace(arrays, Visibility(*tokens)).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize("dim", [64, 128])
def test_lowers_for_tpus(dim: int) -> None:
    program = lowered("pallas", "tpu", dim)
    assert program.count("@tpu_custom_call") == 3
    assert "512x512" not in program


@pytest.mark.parametrize("dim", [64, 128])
def test_lowers_for_gpus(dim: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_attention_stablehlo, "check_cudnn_version", lambda: 91000)  # there is none here
    program = lowered("cudnn", "cuda", dim)
    calls = re.findall(r"custom_call @(\S+?)\(", program)
    assert calls == ["__cudnn$fmhaScaleBiasSoftmax", "__cudnn$fmhaScaleBiasSoftmaxBackward"]
    assert "2x1x512x512" in program and "2x2x512x512" not in program  # the mask, and no scores of all heads
