"""The attention cores by name, and the choice among them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Protocol

import jax

from glm_jax.config.model import GLMConfig
from glm_jax.model import attention_blockwise, attention_cudnn, attention_pallas
from glm_jax.model.attention_core import Core, reference

Name = Literal["reference", "blockwise", "cudnn", "pallas"]
CORES: Mapping[Name, Core] = {
    "reference": reference,
    "blockwise": attention_blockwise.blockwise,
    "cudnn": attention_cudnn.cudnn,
    "pallas": attention_pallas.pallas,
}
DENSE = 512  # tokens up to which one dense product of all scores is faster on CPUs, in a forward pass alone
AMPERE = 8.0  # the compute capability of the oldest GPUs for which cuDNN has fused attention


class Device(Protocol):
    """What is read of a jax device, whose own class is unknown to type checkers."""

    @property
    def platform(self) -> str: ...  # noqa: D102


def platform(device: Device) -> str:
    """Return the platform that `choose` takes: `cuda` for a GPU with fused attention, else `gpu`, `tpu` or `cpu`.

    jax asks the machine for cuDNN, so that there is no fused attention for a GPU that is only described.
    """
    try:
        capability = float(getattr(device, "compute_capability", 0))
    except ValueError:  # that of AMD's is a name
        capability = 0
    fused = capability >= AMPERE and jax.default_backend() == "gpu"
    return "cuda" if fused else device.platform.replace("cuda", "gpu")


def choose(cfg: GLMConfig, platform: str, length: int, compute: str = "float32", *, forward_only: bool = False) -> Name:
    """Return the core for rows of `length` under a `Visibility`.

    `blockwise` is for CPUs, where its loops of small products are the fastest. The fused kernels have neither ALiBi nor
    dropout of probabilities; cuDNN's take half precision, those for TPUs float32 and bfloat16. Only `reference` has a
    softmax in float16.

    Args:
        cfg: the model.
        platform: from `platform`.
        length: S.
        compute: the dtype of queries, keys and values.
        forward_only: whether there is no backward pass.
    """
    if cfg.softmax_dtype != "float32":
        return "reference"
    if platform == "cpu":
        dense = attention_blockwise.block_size(length) is None or (forward_only and length <= DENSE)
        return "reference" if dense else "blockwise"
    if cfg.attention_dropout or cfg.position == "alibi":
        return "reference"
    if platform == "tpu":
        possible = attention_pallas.block_size(length) is not None and compute in ("float32", "bfloat16")
        return "pallas" if possible else "reference"
    multiple, largest = attention_cudnn.DIMS
    fits = cfg.head_dim % multiple == 0 and cfg.head_dim <= largest and length % 2 == 0
    return "cudnn" if platform == "cuda" and compute in ("float16", "bfloat16") and fits else "reference"
