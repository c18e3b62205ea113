"""What may be generated whatever the strategy: the vocabulary, bans, biases, minimum length, repetition penalty.

The functions on the device take one row; strategies map them over rows.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from glm_jax.errors import UserError
from glm_jax.inference.strategies import Request

Array = jax.Array
A = TypeVar("A")  # the arrays' type: np.ndarray on the host, jax.Array on devices


class Vocabulary(NamedTuple):
    """The tokens behind a row of logits."""

    width: int  # V, of the logits; those from `size` on stand for no token
    size: int
    ends: tuple[int, ...]  # tokens that end a fill
    banned: tuple[int, ...] = ()  # tokens that no fill may have: masks, sop


class Constraints(NamedTuple, Generic[A]):
    """The constraints of B rows."""

    size: A  # int32 [B], tokens of the vocabulary
    bias: A  # float32 [B, V], added to the logits; -inf bans
    ends: A  # bool [B, V], tokens that end the row
    seen: A  # bool [B, V], tokens of the context, for the repetition penalty
    repetition_penalty: A  # float32 [B]
    min_tokens: A  # int32 [B], end tokens are banned while there are fewer
    limit: A  # int32 [B], the largest number of tokens, an end token included
    starts: A  # int32 [B, Z, W], tokens that the row does not begin with; -1 behind each


def build(requests: Sequence[Request], vocabulary: Vocabulary, room: int) -> Constraints[np.ndarray]:
    """Return the constraints of requests, in numpy.

    End tokens in a context do not count as seen: a penalty on them would only make fills longer.

    Raises:
        UserError: an option names a token that is not in the vocabulary, or no token is left to generate.
        ValueError: a limit is above `room`, the number of tokens that a row can hold.
    """
    if any(request.limit > room for request in requests):
        raise ValueError(f"a limit is above the room for {room} tokens")
    shape = len(requests), vocabulary.width
    bias, ends, seen = np.zeros(shape, np.float32), np.zeros(shape, bool), np.zeros(shape, bool)
    ends[:, list(vocabulary.ends)] = True
    bias[:, vocabulary.size :] = -np.inf
    bias[:, list(vocabulary.banned)] = -np.inf
    widest = max((len(start) for request in requests for start in request.banned_starts), default=0)
    starts = np.full((len(requests), max(len(request.banned_starts) for request in requests), widest), -1, np.int32)
    for row, (context, _, options, _, avoided) in enumerate(requests):
        for place, start in enumerate(avoided):
            starts[row, place, : len(start)] = start
        for name, tokens in (("bias", [token for token, _ in options.bias]), ("banned", options.banned)):
            for token in tokens:
                if not 0 <= token < vocabulary.size:
                    raise UserError(f"{name} names token {token}: the vocabulary has 0 to {vocabulary.size - 1}")
        for token, value in options.bias:
            bias[row, token] += value
        bias[row, list(options.banned)] = -np.inf
        seen[row, list(context)] = True
        if not (np.isfinite(bias[row]) & ~ends[row]).any():
            raise UserError("banned leaves no token to generate: ban fewer")
    options = [request.options for request in requests]
    return Constraints(
        size=np.full(len(requests), vocabulary.size, np.int32),
        bias=bias,
        ends=ends,
        seen=seen & ~ends,
        repetition_penalty=np.array([one.repetition_penalty for one in options], np.float32),
        min_tokens=np.array([one.min_tokens for one in options], np.int32),
        limit=np.array([request.limit for request in requests], np.int32),
        starts=starts,
    )


def model_log_probabilities(logits: Array, size: Array) -> tuple[Array, Array]:
    """Return the model's own log-probabilities, and whether its logits are finite.

    Args:
        logits: float32 [V].
        size: int32 [], tokens of the vocabulary; the logits from there on do not count.

    Returns:
        float32 [V], -inf outside the vocabulary; bool [].
    """
    inside = jnp.arange(logits.shape[0]) < size  # [V]
    return jax.nn.log_softmax(jnp.where(inside, logits, -jnp.inf)), (jnp.isfinite(logits) | ~inside).all()


def constrained(logits: Array, constraints: Constraints[Array], tokens: Array, count: Array) -> Array:
    """Return the logits after repetition penalty, bias, bans and minimum length, in this order: float32 [V].

    The repetition penalty is that of CTRL (arXiv 1909.05858, section 4.1), with negative logits multiplied, so that it
    never makes a token likelier.

    Args:
        logits: float32 [V].
        constraints: of this row.
        tokens: int32 [R], the first `count` are generated.
        count: int32 [].
    """
    width = logits.shape[0]
    generated = jnp.where(jnp.arange(tokens.shape[0]) < count, tokens, width)  # [R]
    seen = constraints.seen.at[generated].set(True, mode="drop")  # [V]
    penalty = constraints.repetition_penalty
    logits = jnp.where(seen, jnp.where(logits > 0, logits / penalty, logits * penalty), logits)
    early = constraints.ends & (count < constraints.min_tokens)  # [V]
    # not by adding -inf: a logit outside the vocabulary may be anything
    allowed = jnp.where(early | jnp.isneginf(constraints.bias), -jnp.inf, logits + constraints.bias)
    return _without_starts(allowed, constraints.starts, tokens, count) if constraints.starts.size else allowed


def _without_starts(logits: Array, starts: Array, tokens: Array, count: Array) -> Array:
    """Return logits [V] with -inf for every token that would complete one of the starts [Z, W]."""
    reach = min(starts.shape[1] - 1, tokens.shape[0])
    agrees = (starts[:, :reach] == tokens[:reach]) | (jnp.arange(reach) >= count)  # [Z, W - 1]
    ends = (starts >= 0).sum(1) == count + 1  # [Z], those whose last token comes now
    last = jnp.take_along_axis(starts, jnp.full((len(starts), 1), count), axis=1)[:, 0]  # [Z]
    return logits.at[jnp.where(ends & agrees.all(1), last, logits.shape[0])].set(-jnp.inf, mode="drop")
