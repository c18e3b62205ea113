"""A tiny model and what it generates when every row is computed whole again for each token."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.engine.weights import DecodeConfig, place
from glm_jax.inference import beams, sampling
from glm_jax.inference.batch import Decoder, Job, row_positions
from glm_jax.inference.constraints import Vocabulary
from glm_jax.inference.prompts import Context
from glm_jax.inference.strategies import Beam, Generated, Greedy, Options, Request
from glm_jax.model import GLMConfig, apply, init
from glm_jax.parallel import mesh as meshes

CONFIG = GLMConfig(num_layers=3, hidden_size=32, num_heads=8, ffn_size=48, vocab_size=64, max_length=128)
DEEP = dataclasses.replace(CONFIG, num_layers=5)  # for a pipeline of 4 stages
SOP, EOP, MASK, GMASK = 60, 61, 62, 63
VOCABULARY = Vocabulary(64, 64, ends=(EOP,), banned=(SOP, MASK, GMASK))
ROOM = 32
whole = jax.jit(apply, static_argnums=0)
choose = jax.jit(lambda strategy, *arguments: strategy.choose(*arguments), static_argnums=0)


@functools.cache
def params(cfg: GLMConfig) -> Any:
    """Return params whose greedy tokens vary, which those of a fresh model do not."""
    fresh = init(cfg, jax.random.key(3))
    return {**fresh, "blocks": jax.tree.map(lambda array: array * 4.5 if array.ndim > 2 else array, fresh["blocks"])}


@functools.cache
def decoder(cfg: GLMConfig, data: int = 1, pipeline: int = 1, tensor: int = 1) -> Decoder:
    """Return the model on a mesh."""
    mesh = meshes.build({"data": data, "pipeline": pipeline, "tensor": tensor})
    config = DecodeConfig(cfg, cfg.vocab_size)
    return Decoder(config, mesh, place(config, mesh, params(cfg)))


def job(number: int, limit: int = 9, options: Options | None = None) -> Job:
    """Return a blank to fill, different for each number."""
    generator = np.random.default_rng(number)
    size = 3 + 5 * number % 11
    blank = int(generator.integers(0, size))
    tokens = generator.integers(1, 60, size).tolist()
    repeats = number % 3 > 0
    tokens[blank] = MASK if repeats else GMASK
    key = generator.integers(0, 2**32, 2, np.uint32)
    return Job(Context([*tokens, SOP], blank, repeats), Request([*tokens, SOP], limit, options or Greedy(), key))


def recomputed(cfg: GLMConfig, one: Job) -> list[Generated]:
    """Generate without a cache: compute the whole row again for every token."""
    options = one.request.options
    if isinstance(options, Beam):
        strategy, settings, search = beams.begin([one.request], VOCABULARY, ROOM)
        count = options.count
    else:
        strategy, (settings, search) = sampling.Sampler(), sampling.begin([one.request], VOCABULARY, ROOM)
        count = 1
    size = len(one.context.tokens)
    positions = np.repeat(row_positions(cfg, one.context, ROOM)[None], count, axis=0)
    places = np.arange(ROOM)
    allowed = np.repeat(((places[:, None] >= places) | (places < size - 1))[None], count, axis=0)
    tokens = np.zeros((count, ROOM), np.int32)
    tokens[:, :size] = one.context.tokens
    done = np.zeros(count, bool)
    while not done.all():
        logits = whole(cfg, params(cfg), jnp.asarray(tokens), positions, allowed)[:, size - 1]
        choice, search = choose(strategy, logits, settings, search)
        if choice.parents is not None:
            tokens = tokens[np.asarray(choice.parents)]
        tokens[:, size], done = np.asarray(choice.tokens), np.asarray(choice.done)
        size += 1
    if isinstance(settings, beams.Settings) and isinstance(search, beams.Search):
        return beams.finish(settings, search)[0]
    assert isinstance(settings, sampling.Settings) and isinstance(search, sampling.Search)
    return sampling.finish(settings, search)
