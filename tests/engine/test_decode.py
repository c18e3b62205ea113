"""What the compiled program of a token takes, as XLA says it; nothing is allocated."""

import math
from typing import Any

import jax
import pytest

from glm_jax.engine import decode
from glm_jax.engine.weights import DecodeConfig
from glm_jax.inference import sampling
from glm_jax.model import GLMConfig, quantized
from glm_jax.model.quantized import Quantized, Scheme
from glm_jax.parallel import mesh as meshes
from glm_jax.planning import decode_shapes

CONFIG = GLMConfig(num_layers=24, hidden_size=1024, num_heads=16, ffn_size=2816, vocab_size=16384)
ROWS, ROOM = 4, 512


@pytest.mark.slow
def test_a_token_of_an_int4_model_takes_its_packed_bytes_its_cache_and_little_more() -> None:
    assert CONFIG.num_parameters > 3e8
    mesh = meshes.build(dict.fromkeys(meshes.AXES, 1))
    cfg = DecodeConfig(CONFIG, CONFIG.vocab_size)
    params = decode_shapes.param_shapes(CONFIG, Scheme(4, 128))
    shapes = decode_shapes.decode_arguments(cfg, mesh, params, decode_shapes.Batch(1, ROWS, ROOM))
    memory: Any = decode.decode.lower(cfg, mesh, sampling.Sampler(), *shapes).compile().memory_analysis()
    kernels = [leaf for leaf in jax.tree.leaves(params, is_leaf=quantized.is_quantized) if isinstance(leaf, Quantized)]
    packed = sum(math.prod(kernel.values.shape) for kernel in kernels)
    assert packed == 24 * (4 * 1024**2 + 3 * 1024 * 2816) // 2
    embedding, keys = 16384 * 1024 * 4, ROWS * ROOM * 1024 * 4
    cache = 2 * 24 * keys
    assert memory.argument_size_in_bytes + memory.temp_size_in_bytes < 1.1 * (packed + embedding + cache)
    assert memory.alias_size_in_bytes >= cache  # donated, and changed in place:
    assert memory.temp_size_in_bytes < keys  # there is no room for a copy of the keys of even one layer


def test_a_token_copies_no_kernel() -> None:
    glm = GLMConfig(num_layers=1, hidden_size=128, num_heads=2, ffn_size=512, vocab_size=256)
    mesh, cfg = meshes.build(dict.fromkeys(meshes.AXES, 1)), DecodeConfig(glm, glm.vocab_size)
    shapes = decode_shapes.decode_arguments(
        cfg, mesh, decode_shapes.param_shapes(glm), decode_shapes.Batch(groups=1, rows=1, room=32)
    )
    memory: Any = decode.decode.lower(cfg, mesh, sampling.Sampler(), *shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 4 * 3 * 128**2  # the qkv kernel, which is smaller than the feed-forward's
