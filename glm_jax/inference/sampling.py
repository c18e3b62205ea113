"""Greedy decoding and sampling: one independent row for each fill.

Everything a user can set is an array, so another temperature or seed compiles nothing. Token i of a row is drawn with
fold_in(the row's key, i): it depends neither on the row's place nor on its neighbours.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Generic, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.engine.strategy import Choice
from glm_jax.inference import constraints
from glm_jax.inference.constraints import A, Constraints, Vocabulary
from glm_jax.inference.strategies import LARGEST, SMALLEST, Generated, Greedy, Request, Sample

Array = jax.Array


class Settings(NamedTuple, Generic[A]):
    """What does not change while B rows are generated."""

    constraints: Constraints[A]
    key: A  # uint32 [B, 2], raw data of a threefry key
    temperature: A  # float32 [B]
    top_k: A  # int32 [B]
    top_p: A  # float32 [B]


class Search(NamedTuple, Generic[A]):
    """What B rows have generated so far."""

    tokens: A  # int32 [B, R]
    log_probabilities: A  # float32 [B, R], the model's own
    generated: A  # int32 [B], tokens generated
    done: A  # bool [B]
    finite: A  # bool [B], whether all logits were; a row whose logits are not is done


def begin(
    requests: Sequence[Request], vocabulary: Vocabulary, room: int
) -> tuple[Settings[np.ndarray], Search[np.ndarray]]:
    """Return the settings of requests and the search before the first token, in numpy.

    Args:
        requests: with `Greedy` or `Sample` options, which may differ from row to row.
        vocabulary: of the model.
        room: R, at least the largest limit; rows with a limit of 0 are done.

    Raises:
        UserError: see `constraints.build`.
        ValueError: options of beam search, or a limit above the room.
    """
    if not all(isinstance(one.options, Greedy | Sample) for one in requests):
        raise ValueError("rows are sampled with Greedy or Sample options")
    rows = len(requests)
    samples = [one.options if isinstance(one.options, Sample) else Sample(temperature=0.0) for one in requests]
    settings = Settings(
        constraints=constraints.build(requests, vocabulary, room),
        key=np.array([one.key for one in requests], np.uint32).reshape(rows, 2),
        temperature=np.array([min(one.temperature, LARGEST) for one in samples], np.float32),
        top_k=np.array([one.top_k for one in samples], np.int32),
        top_p=np.array([one.top_p for one in samples], np.float32),
    )
    search = Search(
        tokens=np.zeros((rows, room), np.int32),
        log_probabilities=np.zeros((rows, room), np.float32),
        generated=np.zeros(rows, np.int32),
        done=settings.constraints.limit < 1,
        finite=np.ones(rows, bool),
    )
    return settings, search


def finish(settings: Settings[A], search: Search[A]) -> list[Generated]:
    """Return what each row has generated; `search.finite` says which rows mean something."""
    ends = np.asarray(settings.constraints.ends)  # [B, V]
    every_token, every_log_probability = np.asarray(search.tokens), np.asarray(search.log_probabilities)
    results: list[Generated] = []
    for row, count in enumerate(np.asarray(search.generated)):
        tokens = every_token[row, :count].tolist()
        log_probabilities = every_log_probability[row, :count].tolist()
        ended = bool(tokens) and bool(ends[row, tokens[-1]])
        results.append(Generated(tokens, log_probabilities, sum(log_probabilities), ended))
    return results


def scaled(logits: Array, temperature: Array) -> Array:
    """Return logits divided by each row's temperature, up to a constant: float32 [B, V], at most 0.

    Below SMALLEST only the likeliest token of a row keeps a finite logit.

    Args:
        logits: float32 [B, V].
        temperature: float32 [B].
    """
    likeliest = jnp.arange(logits.shape[1]) == jnp.argmax(logits, 1, keepdims=True)  # [B, V]
    # at most 0, so that no quotient becomes +inf or nan
    quotients = (logits - logits.max(1, keepdims=True)) / jnp.clip(temperature, SMALLEST, LARGEST)[:, None]  # [B, V]
    return jnp.where(temperature[:, None] < SMALLEST, jnp.where(likeliest, 0.0, -jnp.inf), quotients)


def filtered(logits: Array, top_k: Array, top_p: Array) -> Array:
    """Return logits with -inf for what each row's top-k, and top-p after it, take away: float32 [B, V].

    Top-k keeps every token as likely as the k-th, so ties may keep more than k; 0 keeps all. Top-p takes the likeliest
    tokens first, equally likely ones in the order of the vocabulary, and keeps each while the probability of all before
    it is at most p. These are the fewest tokens that reach p, and one more if they reach it exactly.

    The released GLM-130B differs in one value: there, a top_p of 0 keeps all tokens. Here 0 keeps only the likeliest.

    Args:
        logits: float32 [B, V], after temperature.
        top_k: int32 [B].
        top_p: float32 [B].
    """
    ordered = jnp.sort(logits, 1, descending=True)  # [B, V]
    kth = jnp.take_along_axis(ordered, jnp.clip(top_k - 1, 0, logits.shape[1] - 1)[:, None], 1)  # [B, 1]
    kth = jnp.where(top_k[:, None] > 0, kth, -jnp.inf)
    logits, ordered = (jnp.where(one >= kth, one, -jnp.inf) for one in (logits, ordered))  # [B, V]
    before = jnp.cumsum(jax.nn.softmax(ordered, 1), 1)[:, :-1]  # [B, V - 1], of all tokens before the second, third...
    beside = jnp.where(top_p < 1, (before <= top_p[:, None]).sum(1), before.shape[1])[:, None]  # [B, 1], the likeliest
    last = jnp.take_along_axis(ordered, beside, 1)  # [B, 1]
    ties = logits == last  # [B, V]
    places = 1 + beside - (ordered > last).sum(1, keepdims=True)  # [B, 1], for ties
    return jnp.where((logits > last) | (ties & (jnp.cumsum(ties, 1) <= places)), logits, -jnp.inf)


def _draw(logits: Array, settings: Settings[Array], generated: Array) -> Array:
    """Draw one token of each row: int32 [B]."""
    kept = filtered(scaled(logits, settings.temperature), settings.top_k, settings.top_p)  # [B, V]

    def draw(key: Array, place: Array, logits: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), place)
        return jax.random.categorical(key, logits).astype(jnp.int32)

    return jax.vmap(draw)(settings.key, generated, kept)


@dataclass(frozen=True)
class Sampler:
    """The strategy of rows that are independent of each other (see `glm_jax.engine.strategy`)."""

    def choose(self, logits: Array, settings: Settings[Array], search: Search[Array]) -> tuple[Choice, Search[Array]]:
        """Choose the next token of each row from logits, float32 [B, V]."""
        rules = settings.constraints
        own, finite = jax.vmap(constraints.model_log_probabilities)(logits, rules.size)  # [B, V], [B]
        allowed = jax.vmap(constraints.constrained)(logits, rules, search.tokens, search.generated)  # [B, V]
        tokens = jax.lax.cond(  # sorting a vocabulary is for those who sample
            (settings.temperature >= SMALLEST).any(),
            lambda: _draw(allowed, settings, search.generated),
            lambda: jnp.argmax(allowed, 1).astype(jnp.int32),
        )  # [B]
        active = ~search.done & finite  # [B]
        rows = jnp.arange(len(tokens))
        place = jnp.where(active, search.generated, search.tokens.shape[1])  # [B], beyond the end: nothing is written
        generated = search.generated + active
        following = Search(
            tokens=search.tokens.at[rows, place].set(tokens, mode="drop"),
            log_probabilities=search.log_probabilities.at[rows, place].set(own[rows, tokens], mode="drop"),
            generated=generated,
            done=search.done | ~finite | rules.ends[rows, tokens] | (generated >= rules.limit),
            finite=search.finite & (search.done | finite),
        )
        return Choice(tokens, None, following.done), following
