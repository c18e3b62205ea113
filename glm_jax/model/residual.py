"""The four normalisation schemes of GLM-130B's ablation, side by side (paper section 2.1 and appendix B).

| scheme   | update of the residual stream x by a sublayer f | depth coefficients                                |
|----------|-------------------------------------------------|---------------------------------------------------|
| post     | x <- LN(x + f(x))                               | none                                              |
| deepnorm | x <- LN(alpha x + f(x))                         | alpha = (2N)^(1/2); gain (2N)^(-1/2) on v, out, ff |
| pre      | x <- x + f(LN(x))                               | gain (2N)^(-1/2) on attention output and ff down  |
| sandwich | x <- x + LN'(f(LN(x)))                          | as pre                                            |

post and deepnorm are written *shifted*, as in the released model: the norm that ends one sublayer is moved to the start
of the next. So there is a norm directly on the embedding and one after the last layer, 2N + 1 in all, and the stream
between blocks is the sum before its norm. This lets all four schemes share one block.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Protocol

import jax

from glm_jax.config.model import GLMConfig

Array = jax.Array


@dataclasses.dataclass(frozen=True)
class DepthCoefficients:
    """What depends on the number of layers N: the residual's factor and the gains of initialisation."""

    alpha: float = 1.0
    value_gain: float = 1.0  # the v rows of qkv; q and k always have gain 1
    output_gain: float = 1.0  # attention output projection
    up_gain: float = 1.0
    down_gain: float = 1.0


def depth_coefficients(norm: str, num_layers: int) -> DepthCoefficients:
    """Return the depth coefficients of a scheme.

    DeepNorm's exponents are 1/2, not the 1/4 of the DeepNet paper (arXiv 2203.00555): GLM-130B derives them for Adam.

    >>> deep = depth_coefficients("deepnorm", num_layers=8)
    >>> deep.alpha, deep.value_gain
    (4.0, 0.25)
    """
    beta = (2 * num_layers) ** -0.5
    if norm == "deepnorm":
        return DepthCoefficients(
            alpha=(2 * num_layers) ** 0.5, value_gain=beta, output_gain=beta, up_gain=beta, down_gain=beta
        )
    if norm in ("pre", "sandwich"):
        return DepthCoefficients(output_gain=beta, down_gain=beta)
    return DepthCoefficients()


class Parts(Protocol):
    """What a scheme may use around a sublayer. Every part that is used has its own params in every sublayer."""

    @property
    def cfg(self) -> GLMConfig:
        """The model config: the scheme, the depth, and keys that only one scheme uses."""
        ...

    def norm(self, name: str, /) -> Callable[[Array], Array]:
        """Return a layer norm, [B, S, D] -> [B, S, D]; the existing schemes use `norm` and `output_norm`."""
        ...

    def scale(self, initial: float, /) -> Array:
        """Return a learnt scalar []."""
        ...


def residual_update(x: Array, sublayer: Callable[[Array], Array], parts: Parts) -> Array:
    """Apply one sublayer to the residual stream x [B, S, D] under the model's scheme; see the table above.

    The residual that alpha multiplies is the *normalised* tensor.
    """
    norm = parts.cfg.norm
    if norm in ("post", "deepnorm"):
        normed = parts.norm("norm")(x)  # [B, S, D]
        return depth_coefficients(norm, parts.cfg.num_layers).alpha * normed + sublayer(normed)  # [B, S, D]
    branch = sublayer(parts.norm("norm")(x))  # [B, S, D]
    return x + (parts.norm("output_norm")(branch) if norm == "sandwich" else branch)  # [B, S, D]
