"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling after temperature, top-k and top-p, applied in this order; temperature 0 is greedy.

    Attributes:
        temperature: divides the logits.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose total probability reaches this; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Array, key: Array) -> Array:
        """Choose one token, int32 [], from float32 logits [V]; -inf is never chosen."""
        if self.temperature == 0.0:
            return jnp.argmax(logits).astype(jnp.int32)
        logits = logits / self.temperature  # [V]
        ordered = jnp.sort(logits, descending=True)  # [V]
        if self.top_k:
            logits = jnp.where(logits >= ordered[min(self.top_k, len(ordered)) - 1], logits, -jnp.inf)  # [V]
            ordered = jnp.sort(logits, descending=True)  # [V]
        if self.top_p < 1.0:
            probabilities = jax.nn.softmax(ordered)  # [V]
            before = jnp.cumsum(probabilities) - probabilities  # [V], total probability of the tokens above each
            last = jnp.maximum(jnp.sum(before < self.top_p) - 1, 0)
            logits = jnp.where(logits >= ordered[last], logits, -jnp.inf)  # [V]
        return jax.random.categorical(key, logits).astype(jnp.int32)


GREEDY = Sampling()
