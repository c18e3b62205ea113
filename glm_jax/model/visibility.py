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

    def blocks(self, size: int) -> Array:
        """Return which blocks of keys the blocks of queries need: bool [B, S / size, S / size].

        A block of keys is needed if there are a query and a key whose segments may be the same. This is read off the
        smallest and the largest segment of each block, which is exact for segments in order.
        """
        nothing = jnp.iinfo(jnp.int32).max
        segments = jnp.where(self.segments > 0, self.segments, nothing)  # padding stands at the end
        in_blocks = segments.reshape(len(segments), -1, size)  # [B, S / size, size]
        low, high = in_blocks.min(-1), in_blocks.max(-1)  # [B, S / size]
        context = self.context.reshape(in_blocks.shape)
        context_low = jnp.where(context, in_blocks, nothing).min(-1)
        context_high = jnp.where(context, in_blocks, -1).max(-1)

        def meet(key_low: Array, key_high: Array) -> Array:  # [B, queries' blocks, keys' blocks]
            return (key_low[:, None] <= high[:, :, None]) & (key_high[:, None] >= low[:, :, None])

        before = jnp.tri(low.shape[1], dtype=bool)  # not after the queries
        return (meet(low, high) & before) | meet(context_low, context_high)


def spans(seen: Array) -> tuple[Array, Array]:
    """Return the first block that each block needs, and the one after the last: int32 [...], of bool [..., blocks]."""
    return jnp.argmax(seen, -1), seen.shape[-1] - jnp.argmax(seen[..., ::-1], -1)


def dense(allowed: Array | Visibility) -> Array:
    """Return `allowed` as bool [B, S, T], whichever form it has."""
    return allowed.dense() if isinstance(allowed, Visibility) else allowed


def queries(allowed: Array | Visibility) -> int:
    """Return S, the number of queries of `allowed`."""
    return allowed.segments.shape[1] if isinstance(allowed, Visibility) else allowed.shape[1]
