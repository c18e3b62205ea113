"""The shapes of what decoding takes, on a mesh that need not exist: for compiling without allocating anything.

They stand where functions take arrays, hence `Any`."""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax import model
from glm_jax.engine import decode, weights
from glm_jax.engine.weights import DecodeConfig
from glm_jax.inference import sampling
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.strategies import Greedy, Request
from glm_jax.model import Cache, GLMConfig, quantized
from glm_jax.model.quantized import INPUTS, Scheme
from glm_jax.parallel import partition


class Batch(NamedTuple):
    """A batch of M groups of B rows, each with room for T tokens."""

    groups: int
    rows: int
    room: int

    def integers(self, mesh: jax.sharding.Mesh, *more: int, dtype: Any = jnp.int32) -> Any:
        """Return the shape of an array [M, B, ...]."""
        sharding = jax.NamedSharding(mesh, decode.GROUPS)
        return jax.ShapeDtypeStruct((self.groups, self.rows, *more), dtype, sharding=sharding)


def param_shapes(cfg: GLMConfig, scheme: Scheme | None = None) -> Any:
    """Return the shapes of float32 params, or of params quantised by a scheme."""

    def one(keys: Any, leaf: jax.ShapeDtypeStruct) -> Any:
        path = tuple(jax.tree_util.keystr((key,), simple=True) for key in keys)
        if scheme is None or path not in INPUTS:
            return leaf
        groups, axis = scheme.layout(path, leaf.shape)
        return jax.eval_shape(functools.partial(quantized.quantize, bits=scheme.bits, groups=groups, axis=axis), leaf)

    return jax.tree.map_with_path(one, model.shapes(cfg))


def prefill_arguments(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Any, batch: Batch) -> tuple[Any, ...]:
    """Return the shapes of what `decode.prefill` takes after the mesh, for contexts that take all the room."""
    tokens = batch.integers(mesh, batch.room)
    return weights.shapes(cfg, mesh, params), decode.Prompts(tokens, tokens, batch.integers(mesh))


def decode_arguments(cfg: DecodeConfig, mesh: jax.sharding.Mesh, params: Any, batch: Batch) -> tuple[Any, ...]:
    """Return the shapes of what `decode.decode` takes after the strategy, which is a Sampler."""
    glm = cfg.model
    vocabulary = Vocabulary(glm.vocab_size, cfg.num_tokens, ends=(1,))
    request = sampling.begin([Request([1], 5, Greedy())] * batch.rows, vocabulary, batch.room)

    def grouped(array: np.ndarray) -> Any:
        return batch.integers(mesh, *array.shape[1:], dtype=array.dtype)

    def number(spec: jax.P, *shape: int) -> Any:
        return jax.ShapeDtypeStruct(shape, jnp.int32, sharding=jax.NamedSharding(mesh, spec))

    settings, search = jax.tree.map(grouped, request)
    stages = mesh.shape["pipeline"]
    held: Any = jax.ShapeDtypeStruct(
        (stages, batch.groups, batch.rows, glm.num_heads, batch.room, glm.head_dim),
        cfg.compute,
        sharding=jax.NamedSharding(mesh, decode.CACHE),
    )
    layers = (held,) * partition.layers_held(glm.num_layers, stages)
    rows, done = batch.integers(mesh), batch.integers(mesh, dtype=jnp.bool_)
    busy = number(jax.P("pipeline"), stages)
    state = decode.Decoding(Cache(layers, layers), rows, rows, done, search, busy, number(jax.P()))
    of_layers = weights.shapes(cfg, mesh, params)
    return of_layers, state, batch.integers(mesh, batch.room), settings, number(jax.P())
