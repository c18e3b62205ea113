"""What decoding asks of a strategy: the next token of every row, from its logits."""

from __future__ import annotations

from typing import NamedTuple, Protocol

import jax

from glm_jax.types import Tree

Array = jax.Array


class Choice(NamedTuple):
    """The next tokens of B rows."""

    tokens: Array  # int32 [B]; of a row that is done it means nothing
    parents: Array | None  # int32 [B], the row whose cache and search each row continues; None: its own
    done: Array  # bool [B], rows that need no further token


class Strategy(Protocol):
    """Chooses tokens inside jit and shard_map, on the rows of one device: no collectives. Static, so hashable."""

    def choose(self, logits: Array, settings: Tree, search: Tree) -> tuple[Choice, Tree]:
        """Choose the next token of every row, and return the search that follows.

        Args:
            logits: float32 [B, V].
            settings: constant; a NamedTuple of arrays whose first axis counts rows, or prompts of several rows each.
            search: what changes from token to token; likewise. That of a row that is done does not change.
        """
        ...
