"""How the next token is chosen from logits."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp

Array = jax.Array

# Temperatures whose reciprocals are float32, too. Devices take denormal numbers for 0.
SMALLEST, LARGEST = float(jnp.finfo(jnp.float32).tiny), 1e30


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Sampling after temperature, top-k and top-p, applied in this order; temperature 0 is greedy.

    Attributes:
        temperature: divides the logits; finite. Below SMALLEST it is greedy, above LARGEST all logits are equal anyway.
        top_k: keep the k most likely tokens; 0 keeps all.
        top_p: keep the fewest most likely tokens whose total probability reaches this; 1 keeps all.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0

    def choose(self, logits: Array, key: Array) -> Array:
        """Choose one token, int32 [], from float32 logits [V]; -inf is never chosen."""
        if self.temperature < SMALLEST:
            return jnp.argmax(logits).astype(jnp.int32)
        # [V]; at most 0, so that no quotient becomes +inf or nan
        logits = (logits - jnp.max(logits)) / min(self.temperature, LARGEST)
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
