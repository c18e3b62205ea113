"""Quantise a model in memory, for inference."""

from __future__ import annotations

from glm_jax.model.quantized import GROUPS, Rounding, Scheme, quantize_params
from glm_jax.model.transformer import Params


def scheme(bits: int, group: int | None = None, rounding: Rounding = "absmax") -> Scheme:
    """Return a scheme; by default 8 bits have one group a row, and 4 bits groups of up to 128 input features.

    Raises:
        UserError: a value is not one that there is.
    """
    return Scheme(bits, GROUPS.get(bits, 0) if group is None else group, rounding)


def quantize(params: Params, bits: int, group: int | None = None, rounding: Rounding = "absmax") -> Params:
    """Return params with the kernels of blocks as integers; embedding, norms and biases stay as they are.

    `glm_jax.model.apply` and everything else that runs blocks takes them. The given params stay in memory as long as
    the caller holds them.

    Args:
        params: as `glm_jax.model.init` gives them, on one device or on a mesh.
        bits: 8 or 4.
        group: the most input features that share a scale; a kernel takes the largest divisor of its inputs up to it. 0
            is all of them. By default 0 for 8 bits and 128 for 4.
        rounding: "absmax" (the release's) or "zeropoint" (the paper's other one).

    Raises:
        UserError: a value is not one of these, params are quantised already, have a number that float16 lacks, or an
            odd number of input features that 4 bits cannot be packed along.
    """
    return quantize_params(params, scheme(bits, group, rounding))
