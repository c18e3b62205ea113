"""What the compiled program of a token takes, as XLA says it; nothing is allocated."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from glm_jax import model
from glm_jax.engine import decode, weights
from glm_jax.engine.weights import DecodeConfig
from glm_jax.inference import sampling
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.strategies import Greedy, Request
from glm_jax.model import Cache, GLMConfig, quantized
from glm_jax.model.quantized import INPUTS, Quantized, Scheme
from glm_jax.parallel import mesh as meshes

CONFIG = GLMConfig(num_layers=24, hidden_size=1024, num_heads=16, ffn_size=2816, vocab_size=16384)
ROWS, ROOM = 4, 512


def quantized_shapes(cfg: GLMConfig, scheme: Scheme) -> Any:
    """Return the shapes of quantised params."""

    def one(keys: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if path not in INPUTS:
            return leaf
        groups, axis = scheme.layout(path, leaf.shape)
        return jax.eval_shape(lambda kernel: quantized.quantize(kernel, scheme.bits, groups, axis), leaf)

    return jax.tree.map_with_path(one, jax.eval_shape(lambda: model.init(cfg, jax.random.key(0))))


def arguments(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Any) -> tuple[Any, ...]:
    """Return the shapes of what a token takes, with one group of rows."""
    glm = cfg.model

    def grouped(tree: Any) -> Any:
        return jax.tree.map(lambda array: jax.ShapeDtypeStruct((1, *array.shape), array.dtype), tree)

    def numbers(*shape: int, dtype: Any = jnp.int32) -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, dtype)

    held = numbers(1, 1, ROWS, glm.num_heads, ROOM, glm.head_dim, dtype=jnp.float32)
    cache = Cache((held,) * glm.num_layers, (held,) * glm.num_layers)
    vocabulary = Vocabulary(glm.vocab_size, glm.vocab_size, ends=(1,))
    settings, search = sampling.begin([Request([1], 5, Greedy())] * ROWS, vocabulary, ROOM)
    rows, done = numbers(1, ROWS), numbers(1, ROWS, dtype=jnp.bool_)
    state = decode.Decoding(cache, rows, rows, done, grouped(search), numbers(1), numbers())
    of_layers = jax.eval_shape(lambda params: weights._split(cfg, mesh, params), params)
    return of_layers, state, numbers(1, ROWS, ROOM), grouped(settings), numbers()


@pytest.mark.slow
def test_a_token_of_an_int4_model_takes_its_packed_bytes_its_cache_and_little_more() -> None:
    assert CONFIG.num_parameters > 3e8
    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    cfg = DecodeConfig(CONFIG, CONFIG.vocab_size)
    params = quantized_shapes(CONFIG, Scheme(4, 128))
    shapes = arguments(cfg, mesh, params)
    memory: Any = decode.decode.lower(cfg, mesh, sampling.Sampler(), *shapes).compile().memory_analysis()
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=quantized.is_quantized) if isinstance(leaf, Quantized)]
    packed = sum(math.prod(kernel.values.shape) for kernel in kernels)
    assert packed == 24 * (4 * 1024**2 + 3 * 1024 * 2816) // 2
    embedding, keys = 16384 * 1024 * 4, ROWS * ROOM * 1024 * 4
    cache = 2 * 24 * keys
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 1.1 * (packed + embedding + cache)
    assert memory.alias_size_in_bytes >= cache  # donated, and changed in place:
    assert memory.temp_size_in_bytes < keys  # there is no room for a copy of the keys of even one layer
