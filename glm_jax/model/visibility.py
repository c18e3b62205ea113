"""Which tokens see which in packed rows, as a structure; made dense only where an attention core needs it."""

from __future__ import annotations

from typing import NamedTuple

import jax
import jax.numpy as jnp

Array = jax.Array


class Visibility(NamedTuple):
    """Which key each query of a row may see.

    Packed samples never see one another. Inside a segment the context sees all of the context, and a target token
    sees the context and the targets up to itself (paper, section 2.2). Padding tokens see one another, so that no row
    of the softmax is empty.
    """

    segments: Array  # int32 [B, S]: 1, 2, ... the samples of a row; 0 is padding
    context: Array  # bool [B, S]

    def dense(self) -> Array:
        """Return `allowed`: bool [B, S, S], True where a query may see a key."""
        length = self.segments.shape[1]
        causal = jnp.arange(length)[:, None] >= jnp.arange(length)[None, :]  # [S, S]
        same = self.segments[:, :, None] == self.segments[:, None, :]  # [B, S, S]
        return same & (causal | self.context[:, None, :])  # [B, S, S]


def dense(allowed: Array | Visibility) -> Array:
    """Return `allowed` as bool [B, S, T], whichever form it has."""
    return allowed.dense() if isinstance(allowed, Visibility) else allowed


def queries(allowed: Array | Visibility) -> int:
    """Return S, the number of queries of `allowed`."""
    return allowed.segments.shape[1] if isinstance(allowed, Visibility) else allowed.shape[1]
