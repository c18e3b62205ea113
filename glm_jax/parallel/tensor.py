"""Tensor and sequence parallelism: collectives in and out of sharded matmuls, and the sharded vocabulary.

Heads and feed-forward features are split over `tensor` (Megatron-LM, arXiv 1909.08053). Between two pairs of matmuls
each member holds a slice of the sequence (arXiv 2205.05198), which shrinks norms, dropout, and the pipeline's messages
and stash. The word embedding's rows are split over `pipeline` and `tensor` together, so that every stage computes a
part of the head (arXiv 2411.05288) and no device ever holds a whole row of logits.

All of this runs inside a shard_map that is manual over every axis and tracks the axes along which values vary
(check_vma), so that JAX transposes each collective into the right one.
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jax import lax

Array = jax.Array

VOCAB_AXES = ("pipeline", "tensor")
SEQUENCE = 1  # the axis of x [B, S, D] that is split over `tensor`


@dataclasses.dataclass(frozen=True)
class ShardedAxis:
    """The tensor axis that model/ asks for, as collectives over the `size` members of `tensor`."""

    size: int
    vocab_shards: int

    def part(self, count: int) -> Array:
        """Return which of `count` heads this member holds: int32 [count / size]."""
        share = count // self.size
        return lax.axis_index("tensor") * share + jnp.arange(share)

    def tokens(self, count: int) -> Array:
        """Return which of `count` tokens this member holds: int32 [count / size]."""
        return self.part(count)

    def enter(self, x: Array) -> Array:
        """Gather the sequence: x [B, S / size, D] -> [B, S, D]."""
        return x if self.size == 1 else lax.all_gather(x, "tensor", axis=SEQUENCE, tiled=True)

    def leave(self, x: Array) -> Array:
        """Sum partial results and keep a slice of the sequence: x [B, S, D] -> [B, S / size, D]."""
        return x if self.size == 1 else lax.psum_scatter(x, "tensor", scatter_dimension=SEQUENCE, tiled=True)

    def lookup(self, table: Array, tokens: Array) -> Array:
        """Look up tokens [B, S] in the word embedding, of which this device holds `table` [V / shards, D].

        Returns:
            [B, S / size, D], the same on every stage.
        """
        row = tokens - first_row(table.shape[0])  # [B, S]
        here = (row >= 0) & (row < table.shape[0])  # [B, S]
        found = jnp.take(table, jnp.clip(row, 0, table.shape[0] - 1), axis=0)  # [B, S, D]
        return lax.psum(self.leave(jnp.where(here[..., None], found, 0)), "pipeline")  # [B, S / size, D]


@dataclasses.dataclass(frozen=True)
class WholeAxis(ShardedAxis):
    """The same without splitting the sequence, for decoding, where it has a single token."""

    def tokens(self, count: int) -> Array:
        """Return which of `count` tokens this member holds: all of them, int32 [count]."""
        return jnp.arange(count)

    def enter(self, x: Array) -> Array:
        """Return x [B, S, D], which is whole."""
        return x

    def leave(self, x: Array) -> Array:
        """Sum partial results x [B, S, D]."""
        return lax.psum(x, "tensor")


def first_row(rows: int) -> Array:
    """Return the index of the first of the `rows` rows of the vocabulary that this device holds."""
    return lax.axis_index(VOCAB_AXES) * rows
