"""Generation token by token: prefill of the context, then a loop over the cache, all in one jitted function."""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.data.rows.blanks import sample_positions
from glm_jax.errors import UserError
from glm_jax.inference.strategies import Sampling
from glm_jax.model import Cache, GLMConfig, apply_cached, init_cache
from glm_jax.types import Tree

Array = jax.Array

BUCKET = 64  # rows are padded to a multiple of it, so that few lengths are compiled


class NotFinite(UserError):
    """A model whose logits are infinite or not numbers."""


class _Progress(NamedTuple):
    tokens: Array  # int32 [T], the row: context, sop, generated tokens
    place: Array  # int32 [], of the newest token
    logits: Array  # float32 [V], computed at that token
    cache: Cache
    key: Array
    done: Array  # bool []
    finite: Array  # bool [], whether all logits so far were


def row_positions(cfg: GLMConfig, length: int, context: int, blank: int, repeats: bool) -> np.ndarray:
    """Return the positions of a row: int32 [1, T], or [1, 2, T] for learned_2d.

    Args:
        cfg: the model.
        length: T.
        context: the number of its tokens; sop follows them.
        blank: the place of the mask to fill.
        repeats: True for [MASK] and [sMASK], whose fill keeps the mask's position; False for [gMASK], whose fill
            continues to count. The original GLM (learned_2d) always repeats, and counts in the second stream.
    """
    streams = sample_positions(
        context, np.array([blank]), np.array([length - context]), repeat=repeats or cfg.position == "learned_2d"
    )
    if cfg.position != "learned_2d":
        return streams[0][None]
    # the padding behind the longest fill may lie beyond the tables, where a look-up gives NaN
    return np.minimum(np.stack(streams)[None], cfg.max_length - 1)


@functools.partial(jax.jit, static_argnums=(0, 1))
def _generate(
    cfg: GLMConfig,
    sampling: Sampling,
    params: Tree,
    tokens: Array,
    positions: Array,
    sop: Array,
    stop: Array,
    banned: Array,
    ends: Array,
    key: Array,
) -> tuple[Array, Array, Array]:
    """Generate after the sop at place `sop` until an end token, place `stop`, or logits that are not finite.

    tokens int32 [T], positions int32 [1, T] or [1, 2, T], banned and ends bool [V]. Return the row, the last place, and
    whether all logits were finite.
    """
    length = tokens.shape[0]
    keys, queries = jnp.arange(length), jnp.arange(length)[:, None]
    allowed = ((keys <= queries) | (keys < sop)) & (keys <= sop)  # [T, T]; the context does not see sop
    cache = init_cache(cfg, 1, length, params["embedding"]["word"].dtype)
    logits, cache = apply_cached(cfg, params, tokens[None], positions, allowed[None], cache, jnp.int32(0))

    def unfinished(progress: _Progress) -> Array:
        return progress.finite & ~progress.done & (progress.place < stop)

    def extend(progress: _Progress) -> _Progress:
        key, choice_key = jax.random.split(progress.key)
        first = progress.place == sop
        forbidden = banned | (ends & first)  # no span is empty in training
        token = sampling.choose(jnp.where(forbidden, -jnp.inf, progress.logits), choice_key)
        place = progress.place + 1
        row = progress.tokens.at[place].set(token)
        logits, cache = apply_cached(
            cfg, params, token[None, None], positions, (keys <= place)[None, None], progress.cache, place
        )
        finite = jnp.isfinite(logits).all()  # in the loop on the device: asking the host would slow it down
        return _Progress(row, place, logits[0, 0], cache, key, ends[token], finite)

    first = logits[0, sop]  # [V]
    start = _Progress(tokens, sop, first, cache, key, jnp.bool_(False), jnp.isfinite(first).all())
    end = jax.lax.while_loop(unfinished, extend, start)
    return end.tokens, end.place, end.finite


def generate(
    cfg: GLMConfig,
    params: Tree,
    context: list[int],
    blank: int,
    *,
    sop: int,
    repeats: bool,
    ends: list[int],
    banned: np.ndarray,
    budget: int,
    sampling: Sampling,
    key: Array,
) -> list[int]:
    """Generate the fill of one blank in the layout of the released generate.py: context, sop, generated tokens.

    Args:
        cfg, params: the model.
        context: tokens, with the mask at index `blank`; sop is added here.
        blank, repeats: see `row_positions`.
        sop, ends: special ids; an end token stops generation and is not returned.
        banned: bool [V], tokens that are never generated.
        budget: the largest number of tokens to generate.
        sampling: how each token is chosen.
        key: random key for sampling.

    Returns:
        The generated tokens.

    Raises:
        NotFinite: the model gives logits that are not finite.
    """
    size = len(context)
    length = -(-(size + 1 + budget) // BUCKET) * BUCKET
    tokens = np.zeros(length, np.int32)  # [T]
    tokens[:size], tokens[size] = context, sop
    positions = row_positions(cfg, length, size, blank, repeats)
    end_tokens = np.zeros(cfg.vocab_size, bool)  # [V]
    end_tokens[ends] = True
    arrays = (tokens, positions, np.int32(size), np.int32(size + budget), banned, end_tokens, key)
    row, place, finite = _generate(cfg, sampling, params, *arrays)
    if not finite:
        raise NotFinite("the model's logits are not finite: the run has diverged, use an earlier checkpoint")
    generated = np.asarray(row)[size + 1 : int(place) + 1].tolist()
    if generated and generated[-1] in ends:
        generated.pop()
    return generated
