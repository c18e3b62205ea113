"""The official GLM130B of SwissArmyTransformer in torch on a CPU, for `decode.py` beside it.

As published, the class needs a GPU, apex and triton. What replaces them here changes no arithmetic but the dtype of
the attention probabilities, which the class rounds to float16 without apex: they stay float32.
"""

from __future__ import annotations

import sys
import types
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np


def load(checkpoint: Path, sizes: Mapping[str, int], threads: int) -> Any:
    """Return the official model with the weights of a checkpoint of one rank.

    Args:
        checkpoint: the `.pt` file.
        sizes: num_layers, hidden_size, inner_hidden_size, num_attention_heads, vocab_size, max_sequence_length.
        threads: of torch.

    Raises:
        ImportError: torch or SwissArmyTransformer is not installed.
    """
    import torch  # pyright: ignore[reportMissingImports]

    triton: Any = types.ModuleType("triton")  # imported for kernels that this class does not use
    language: Any = types.ModuleType("triton.language")
    triton.language, triton.jit, language.constexpr = language, lambda function: function, object
    sys.modules |= {"triton": triton, "triton.language": triton.language}
    torch.cuda.current_device = lambda: torch.device("cpu")  # where the class puts its tables and scores
    torch.set_num_threads(threads)

    from sat.model.official.glm130B_model import GLM130B  # pyright: ignore[reportMissingImports]

    del sys.modules["triton"], sys.modules["triton.language"]  # torch would take them for the real ones
    flags = {"fp16": False, "model_parallel_size": 1, "layernorm_order": "pre", "skip_init": True}
    model = GLM130B(types.SimpleNamespace(**sizes, **flags, position_encoding_2d=False, no_glu=False))
    model.get_mixin("fp32-softmax").scale_mask_softmax = _Softmax()  # apex's in the class
    model = model.float().eval()  # reinit makes the feed-forward in half precision
    missing, unexpected = model.load_state_dict(torch.load(checkpoint, weights_only=True)["module"], strict=False)
    if missing or unexpected:
        raise ValueError(f"the checkpoint does not fit the official class: {missing} missing, {unexpected} unexpected")
    return model


class _Softmax:
    """What apex's FusedScaleMaskSoftmax computes; a token that sees everything needs no mask, as in the class."""

    scale = 1.0  # set by the class for each layer

    def __call__(self, scores: Any, blocked: Any) -> Any:
        import torch  # pyright: ignore[reportMissingImports]

        if scores.shape[-2] > 1:
            scores.masked_fill_(blocked.bool(), -10000.0)  # the transformer makes masks float
        return torch.softmax(scores * self.scale, dim=-1)


def greedy(model: Any, contexts: np.ndarray, sop: int, new: int) -> tuple[Callable[[], Any], Callable[[], Any]]:
    """Return two functions: the first reads the contexts and makes one token, the other makes the rest.

    Args:
        model: from `load`.
        contexts: int [B, S], without sop; every position counts ([gMASK]).
        sop: the token after the context.
        new: tokens to generate. The second function returns them, int [B, new].
    """
    import torch  # pyright: ignore[reportMissingImports]
    from sat.generation.autoregressive_sampling import update_mems  # pyright: ignore[reportMissingImports]

    rows, length = contexts.shape
    tokens = torch.from_numpy(np.concatenate([contexts, np.full((rows, 1), sop)], 1).astype(np.int64))
    positions = torch.arange(length + new).repeat(rows, 1)
    made: list[Any] = []
    cache = None

    def step(tokens: Any, blocked: Any, start: int) -> None:
        nonlocal cache
        here = positions[:, start : start + tokens.shape[1]]
        logits, *layers = model(input_ids=tokens, position_ids=here, attention_mask=blocked, mems=cache)
        cache = update_mems([layer["mem_kv"] for layer in layers], cache, max_memory_length=length + new)
        made.append(logits[:, -1].argmax(-1))

    @torch.inference_mode()
    def first() -> None:
        blocked = torch.zeros(1, 1, length + 1, length + 1, dtype=torch.bool)
        blocked[..., :length, length] = True  # the context does not see sop
        step(tokens, blocked, 0)

    @torch.inference_mode()
    def rest() -> Sequence[Sequence[int]]:
        for place in range(length + 1, length + new):
            step(made[-1][:, None], torch.zeros(1, 1, 1, place + 1, dtype=torch.bool), place)
        return torch.stack(made, 1).tolist()

    return first, rest


def trainer(model: Any, rows: Mapping[str, np.ndarray], lr: float) -> Callable[[], dict[str, float]]:
    """Return a function that takes a training step, AdamW on gradients clipped to norm 1, and returns its loss.

    Args:
        model: from `load`.
        rows: the batch's arrays by name, see glm_jax.data.rows.rows.
        lr: learning rate.
    """
    import torch  # pyright: ignore[reportMissingImports]

    tokens, targets, positions = (
        torch.from_numpy(array.astype(np.int64)) for array in (rows["tokens"], rows["targets"], rows["positions"])
    )
    places = np.arange(rows["tokens"].shape[1])
    same = rows["segments"][:, :, None] == rows["segments"][:, None, :]
    allowed = same & ((places[:, None] >= places) | rows["context"][:, None, :])
    blocked = torch.from_numpy(~allowed)[:, None]  # [B, 1, S, S]
    counted = torch.from_numpy(rows["loss_mask"].reshape(-1))
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.1, fused=True)

    def step() -> dict[str, float]:
        logits = model(input_ids=tokens, position_ids=positions, attention_mask=blocked)[0]
        losses = torch.nn.functional.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
        loss = (losses * counted).sum() / counted.sum()
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        return {"loss": float(loss)}

    return step
