"""Generation and scoring on a mesh: prefill of contexts, one token after another, and the loss of given targets.

All of it runs in shard_maps that are manual over every axis. Rows are split over `data`, heads, features and the
vocabulary over `tensor`, layers over `pipeline`; weights stay where they are. Each stage works on another group of rows
at a time, so that with as many groups as stages none waits for another:

    tick      0   1   2   3   4   5   ...
    stage 0   A0  B0  A1  B1  A2  B2        groups A and B, each with its tokens 0, 1, 2
    stage 1       A0  B0  A1  B1  A2

The token that a group's row gets after the last stage is what the first stage reads in the next tick.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from glm_jax.engine.strategy import Strategy
from glm_jax.engine.weights import DecodeConfig, Weights, specs
from glm_jax.model import Cache, Visibility
from glm_jax.model.attention_core import Core, reference
from glm_jax.model.attention_cores import CORES, Name, choose, platform
from glm_jax.model.cached import blocks_cached, embed_cached, places_of
from glm_jax.model.positions import PositionTerms, position_terms
from glm_jax.model.transformer import head
from glm_jax.parallel import cross_entropy
from glm_jax.parallel.pipeline.run import shift
from glm_jax.parallel.pipeline.stage import at, put
from glm_jax.parallel.tensor import VOCAB_AXES, WholeAxis
from glm_jax.types import Tree

Array = jax.Array

SCORED = 64  # tokens of a row whose logits are in memory at a time
GROUPS = jax.P(None, "data")  # of arrays [M, B, ...]
CACHE = jax.P("pipeline", None, "data", "tensor")  # of arrays [P, M, B, N, T, K]


class Prompts(NamedTuple):
    """Contexts: M groups of B rows, whose lengths may all differ."""

    tokens: Array  # int32 [M, B, S], padded on the right
    positions: Array  # int32 [M, B, T] or [M, B, 2, T]: of the context, then of what is generated after it
    lengths: Array  # int32 [M, B]: tokens of context
    blocks: Array | None = None  # int32 [M, B, S]: tokens of different blocks do not see each other, all see those of 0


class Decoding(NamedTuple):
    """What a token changes."""

    cache: Cache  # arrays [P, M, B, N, T, K], one a layer of a stage
    lengths: Array  # int32 [M, B]: tokens in the cache
    tokens: Array  # int32 [M, B]: the newest token of each row, which is not in the cache yet
    done: Array  # bool [M, B]
    search: Tree  # the strategy's, arrays [M, ...]
    busy: Array  # int32 [P]: ticks in which a stage had work
    ticks: Array  # int32 []


class _Stage:
    """What one device does of a forward pass. Call it inside a shard_map."""

    def __init__(self, cfg: DecodeConfig, mesh: jax.sharding.Mesh, weights: Weights) -> None:
        sizes = mesh.shape
        self.glm, self.outer = dataclasses.replace(cfg.model, attention_dropout=0.0), weights.outer
        self.attention: Name | None = cfg.attention
        self.mesh = mesh
        self.stages, self.index = sizes["pipeline"], lax.axis_index("pipeline")
        self.axis = WholeAxis(sizes["tensor"], sizes["pipeline"] * sizes["tensor"])
        self.layers = jax.tree.map(lambda array: array[0], weights.layers)
        self.first = self.index * len(self.layers)
        self.held = jnp.clip(self.glm.num_layers - self.first, 0, len(self.layers))  # without layers that only pad

    def enter(self, x: Array, tokens: Array, positions: Array, start: Array) -> Array:
        """Return what the stage reads, [B, S, D]: x, or the embedding of the tokens [B, S] on the first stage."""
        places = places_of(start, tokens.shape[1])  # [B, S]
        fresh = embed_cached(self.glm, self.outer, tokens, positions, places, self.axis)  # [B, S, D]
        return jnp.where(self.index == 0, fresh, x)

    def run(
        self, x: Array, positions: Array, start: Array, context: Array, cache: Cache, group: Array, active: Array
    ) -> tuple[Array, Cache]:
        """Run new tokens x [B, S, D] of a group through the stage's layers, or do nothing unless `active`."""
        places = places_of(start, x.shape[1])  # [B, S]
        allowed = visible(places, context, positions.shape[-1])  # [B, S, T]
        terms = position_terms(self.glm, positions, x.dtype, places)
        return self._run(x, allowed, terms, start, cache, group, active, reference)

    def run_rows(
        self, x: Array, positions: Array, context: Array, cache: Cache, group: Array, active: Array,
        blocks: Array | None = None,
    ) -> tuple[Array, Cache]:  # fmt: skip
        """Run whole rows x [B, S, D], which begin at place 0; they see what `visible` says, and themselves alone.

        With `blocks`, int32 [B, S], they see what `same_block` leaves of that, by the reference core.
        """
        rows, length = x.shape[:2]
        start = jnp.zeros(rows, jnp.int32)
        terms = position_terms(self.glm, positions[..., :length], x.dtype)
        if blocks is None:
            allowed = Visibility(jnp.ones((rows, length), jnp.int32), jnp.arange(length) < context[:, None])
            core = CORES[self.attention or self._choose(length, x.dtype.name)]
        else:
            allowed, core = visible(places_of(start, length), context, length) & same_block(blocks), reference
        return self._run(x, allowed, terms, start, cache, group, active, core)

    def _choose(self, length: int, compute: str) -> Name:
        """Return the core for contexts of `length` tokens on the mesh's devices, which an abstract mesh lacks."""
        return choose(self.glm, platform(self.mesh.devices.flat[0]), length, compute, forward_only=True)

    def _run(
        self, x: Array, allowed: Array | Visibility, terms: PositionTerms, start: Array, cache: Cache, group: Array,
        active: Array, core: Core,
    ) -> tuple[Array, Cache]:  # fmt: skip
        count = None if self.stages == 1 else jnp.where(active, self.held, 0)
        return blocks_cached(
            self.glm, self.layers, x, allowed, terms, cache, group, start, self.first, count, self.axis, core
        )

    def leave(self, x: Array, places: Array) -> Array:
        """Return float32 logits [B, A, V / shards] of the last stage's x [B, S, D] at places [B, A], on every stage."""
        x = jnp.take_along_axis(x, places[:, :, None], axis=1)  # [B, A, D]
        x = lax.psum(jnp.where(self.index == self.stages - 1, x, 0), "pipeline")  # [B, A, D]
        return head(self.glm, self.outer, x, self.axis)


def visible(places: Array, context: Array, length: int) -> Array:
    """Return which of a row's `length` tokens each token sees: the context, and what is not behind itself.

    Args:
        places: int32 [B, S], of the tokens.
        context: int32 [B], the length of the context, without sop.
        length: T.

    Returns:
        bool [B, S, T].
    """
    keys = jnp.arange(length)  # [T]
    return (keys <= places[..., None]) | (keys < context[:, None, None])


def same_block(blocks: Array) -> Array:
    """Return which tokens their blocks [B, S] do not keep apart, as block 0 is open to all: bool [B, S, S]."""
    keys = blocks[:, None, :]  # [B, 1, S]
    return (keys == 0) | (keys == blocks[:, :, None])


def _empty_cache(cfg: DecodeConfig, mesh: jax.sharding.Mesh, layers: int, groups: int, rows: int, room: int) -> Cache:
    """Return this device's empty cache, arrays [M, B, N, T, K]."""
    heads = cfg.model.num_heads // mesh.shape["tensor"]
    empty = jnp.zeros((groups, rows, heads, room, cfg.model.head_dim), cfg.compute)
    return Cache((empty,) * layers, (empty,) * layers)


def _add_stage(cache: Cache) -> Cache:
    return jax.tree.map(lambda array: array[None], cache)


@functools.partial(jax.jit, static_argnums=(0, 1))
def prefill(cfg: DecodeConfig, mesh: jax.sharding.Mesh, weights: Weights, prompts: Prompts) -> Cache:
    """Return the cache of contexts, whose tokens all see one another: arrays [P, M, B, N, T, K].

    No logits are made: generation begins with the token that follows the context (sop).
    """
    groups = prompts.tokens.shape[0]

    def local(weights: Weights, prompts: Prompts) -> Cache:
        stage = _Stage(cfg, mesh, weights)
        rows, length = prompts.tokens.shape[1:]
        start = jnp.zeros(rows, jnp.int32)

        def tick(time: Array, carry: tuple[Array, Cache]) -> tuple[Array, Cache]:
            x, cache = carry
            entering = at(prompts, jnp.minimum(time, groups - 1))
            x = stage.enter(x, entering.tokens, entering.positions, start)  # [B, S, D]
            group = time - stage.index
            here = jnp.clip(group, 0, groups - 1)
            prompt, active = at(prompts, here), (group >= 0) & (group < groups)
            x, cache = stage.run_rows(x, prompt.positions, prompt.lengths, cache, here, active)
            return shift(x, 1), cache

        room = prompts.positions.shape[-1]
        cache = _empty_cache(cfg, mesh, len(stage.layers), groups, rows, room)
        x = jnp.zeros((rows, length, cfg.model.hidden_size), cfg.compute)
        return _add_stage(lax.fori_loop(0, groups + stage.stages - 1, tick, (x, cache))[1])

    in_specs = (specs(cfg.model, weights), jax.tree.map(lambda _: GROUPS, prompts))
    # what is gathered or chosen is alike on all members, which jax cannot know: check_vma would refuse it
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=CACHE, check_vma=False)
    return mapped(weights, prompts)


@functools.partial(jax.jit, static_argnums=(0, 1, 2), donate_argnums=4)
def decode(
    cfg: DecodeConfig,
    mesh: jax.sharding.Mesh,
    strategy: Strategy,
    weights: Weights,
    decoding: Decoding,
    positions: Array,
    settings: Tree,
    turns: Array,
) -> Decoding:
    """Generate up to `turns` tokens in every row, or until all rows are done.

    Args:
        cfg, mesh, strategy: static.
        weights: on the mesh.
        decoding: donated: the cache is changed in place.
        positions: int32 [M, B, T] or [M, B, 2, T].
        settings: of the strategy, arrays [M, ...].
        turns: int32 [].
    """
    grouped = jax.tree.map(lambda _: GROUPS, decoding)
    state_specs = grouped._replace(
        cache=jax.tree.map(lambda _: CACHE, decoding.cache), busy=jax.P("pipeline"), ticks=jax.P()
    )
    in_specs = (
        specs(cfg.model, weights),
        state_specs,
        GROUPS,
        jax.tree.map(lambda _: GROUPS, settings),
        jax.P(),
    )
    local = functools.partial(_advance, cfg, mesh, strategy)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=state_specs, check_vma=False)
    return mapped(weights, decoding, positions, settings, turns)


class _Flight(NamedTuple):
    """What one tick of decoding passes to the next."""

    time: Array  # int32 []
    x: Array  # [B, 1, D], from the previous stage
    state: Decoding
    alive: Array  # int32 [], 0 once every row is done


def _advance(
    cfg: DecodeConfig,
    mesh: jax.sharding.Mesh,
    strategy: Strategy,
    weights: Weights,
    decoding: Decoding,
    positions: Array,
    settings: Tree,
    turns: Array,
) -> Decoding:
    """Do one device's part of `decode`."""
    groups = decoding.tokens.shape[0]
    stage = _Stage(cfg, mesh, weights)
    period = max(groups, stage.stages)  # ticks from one token of a group to its next
    ticks = jnp.where(turns > 0, (turns - 1) * period + groups + stage.stages - 1, 0)

    def job(time: Array) -> tuple[Array, Array]:
        """Return the group that has been under way for `time` ticks, and whether there is one."""
        group = time % period
        return jnp.minimum(group, groups - 1), (time >= 0) & (group < groups) & (time < turns * period)

    def tick(carry: _Flight) -> _Flight:
        time, x, state, alive = carry
        group, _ = job(time)
        entering = state.tokens[group][:, None], positions[group], state.lengths[group]
        x = stage.enter(x, *entering)  # [B, 1, D]
        group, active = job(time - stage.index)
        lengths = state.lengths[group]  # [B]
        x, cache = stage.run(x, positions[group], lengths, lengths, state.cache, group, active)
        state = state._replace(cache=cache, busy=state.busy + active, ticks=state.ticks + 1)
        group, leaving = job(time - (stage.stages - 1))

        def choose(state: Decoding) -> Decoding:
            logits = stage.leave(x, jnp.zeros((x.shape[0], 1), jnp.int32))[:, 0]  # [B, V / shards]
            logits = lax.all_gather(logits, VOCAB_AXES, axis=1, tiled=True)  # [B, V]
            return _choose(strategy, state, group, logits, at(settings, group))

        if stage.stages == 1:
            state = choose(state)
        else:
            state = lax.fori_loop(0, leaving.astype(jnp.int32), lambda _, state: choose(state), state)
        alive = lax.pmax((~state.done).any().astype(jnp.int32), "data")
        return _Flight(time + 1, shift(x, 1), state, alive)

    def unfinished(carry: _Flight) -> Array:
        return (carry.time < ticks) & (carry.alive > 0)

    rows = decoding.tokens.shape[1]
    x = jnp.zeros((rows, 1, cfg.model.hidden_size), cfg.compute)
    state = decoding._replace(cache=jax.tree.map(lambda array: array[0], decoding.cache))
    alive = lax.pmax((~state.done).any().astype(jnp.int32), "data")
    state = lax.while_loop(unfinished, tick, _Flight(jnp.int32(0), x, state, alive)).state
    return state._replace(cache=_add_stage(state.cache))


def _choose(strategy: Strategy, state: Decoding, group: Array, logits: Array, settings: Tree) -> Decoding:
    """Let the strategy choose the next token of each row of a group, from logits [B, V]."""
    search = at(state.search, group)
    choice, search = strategy.choose(logits, settings, search)
    cache = state.cache
    if choice.parents is not None:
        parents = choice.parents  # [B]
        cache = jax.tree.map(lambda array: put(array, jnp.take(at(array, group), parents, axis=0), group), cache)
    lengths = jnp.where(state.done[group], state.lengths[group], state.lengths[group] + 1)  # [B]
    lengths, tokens, done, search = put(
        (state.lengths, state.tokens, state.done, state.search), (lengths, choice.tokens, choice.done, search), group
    )
    return state._replace(cache=cache, lengths=lengths, tokens=tokens, done=done, search=search)


@functools.partial(jax.jit, static_argnums=(0, 1))
def token_losses(
    cfg: DecodeConfig, mesh: jax.sharding.Mesh, weights: Weights, prompts: Prompts, places: Array, targets: Array
) -> tuple[Array, Array]:
    """Return the loss in nats of given targets, and whether no token is likelier: float32 [M, B, A], bool [M, B, A].

    Args:
        cfg, mesh: static.
        weights: on the mesh.
        prompts: whole rows; `lengths` is the number of tokens that all others see, the rest see what is before them,
            in their own block if there are several. T = S.
        places: int32 [M, B, A], the tokens whose logits count; A is at most SCORED, or a multiple of it.
        targets: int32 [M, B, A], what follows each.
    """
    groups = prompts.tokens.shape[0]

    def score(stage: _Stage, x: Array, places: Array, targets: Array) -> tuple[Array, Array]:
        """Score a group, [B, A], SCORED tokens of each row at a time: their logits are large."""

        def part(asked: tuple[Array, Array]) -> tuple[Array, Array]:
            logits = stage.leave(x, asked[0])  # [B, A, V / shards]
            return cross_entropy.scores(logits, asked[1], cfg.num_tokens)

        rows, width = targets.shape
        if width <= SCORED:
            return part((places, targets))
        parts = [array.reshape(rows, -1, SCORED).swapaxes(0, 1) for array in (places, targets)]  # [A / 64, B, 64]
        found = lax.map(part, (parts[0], parts[1]))  # of arrays [A / 64, B, 64]
        return jax.tree.map(lambda array: array.swapaxes(0, 1).reshape(rows, width), found)

    def local(weights: Weights, prompts: Prompts, places: Array, targets: Array) -> tuple[Array, Array]:
        stage = _Stage(cfg, mesh, weights)
        rows, length = prompts.tokens.shape[1:]
        start, only = jnp.zeros(rows, jnp.int32), jnp.int32(0)

        def tick(time: Array, carry: tuple[Array, Cache, Tree]) -> tuple[Array, Cache, Tree]:
            x, cache, found = carry
            entering = at(prompts, jnp.minimum(time, groups - 1))
            x = stage.enter(x, entering.tokens, entering.positions, start)  # [B, S, D]
            group = time - stage.index
            prompt, active = at(prompts, jnp.clip(group, 0, groups - 1)), (group >= 0) & (group < groups)
            x, cache = stage.run_rows(x, prompt.positions, prompt.lengths, cache, only, active, prompt.blocks)
            leaving = jnp.maximum(time - (stage.stages - 1), 0)  # the first ones are overwritten
            found = put(found, score(stage, x, places[leaving], targets[leaving]), leaving)
            return shift(x, 1), cache, found

        cache = _empty_cache(cfg, mesh, len(stage.layers), 1, rows, length)
        x = jnp.zeros((rows, length, cfg.model.hidden_size), cfg.compute)
        losses = jnp.zeros(targets.shape, jnp.promote_types(cfg.compute, jnp.float32))
        found = losses, jnp.zeros(targets.shape, bool)
        return lax.fori_loop(0, groups + stage.stages - 1, tick, (x, cache, found))[2]

    in_specs = (specs(cfg.model, weights), jax.tree.map(lambda _: GROUPS, prompts), GROUPS, GROUPS)
    mapped = jax.shard_map(local, mesh=mesh, in_specs=in_specs, out_specs=GROUPS, check_vma=False)
    return mapped(weights, prompts, places, targets)


def begin(mesh: jax.sharding.Mesh, cache: Cache, lengths: Array, tokens: Array, done: Array, search: Tree) -> Decoding:
    """Return the state before the first token.

    Args:
        mesh: of the cache.
        cache: from `prefill`, with as many rows as the other arrays.
        lengths: int32 [M, B], tokens of context.
        tokens: int32 [M, B], the token after each context (sop).
        done: bool [M, B], rows that only fill up a batch.
        search: of the strategy.
    """
    busy = jax.device_put(np.zeros(mesh.shape["pipeline"], np.int32), jax.NamedSharding(mesh, jax.P("pipeline")))
    ticks = jax.device_put(np.int32(0), jax.NamedSharding(mesh, jax.P()))
    return Decoding(cache, lengths, tokens, done, search, busy, ticks)


@functools.partial(jax.jit, static_argnums=(0, 2))
def repeat_rows(mesh: jax.sharding.Mesh, cache: Cache, times: int) -> Cache:
    """Return the cache with every row `times` times, side by side."""

    def local(cache: Cache) -> Cache:
        return jax.tree.map(lambda array: jnp.repeat(array, times, axis=2), cache)

    return jax.shard_map(local, mesh=mesh, in_specs=CACHE, out_specs=CACHE)(cache)
