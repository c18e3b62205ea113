"""The model against arrays from the official torch classes: logits, loss, gradients and greedy decoding.

tests/goldens/README.md says what the arrays are and where the tolerances come from.
"""

import dataclasses
import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.interop import sat
from glm_jax.model import GLMConfig, apply

GOLDENS = Path(__file__).parent.parent / "goldens"
LOGITS, LOSS, GRADIENT = 5e-4, 1e-5, 2e-4
CHECKPOINTS = ["glm130b/ckpt_tp1", "glm130b/ckpt_tp2", "glm10b_style/ckpt_tp1"]
CASES = [
    (checkpoint, case)
    for checkpoint in CHECKPOINTS
    for case in ("gmask", "mask", "long", "choices", "padded")
    if checkpoint.startswith("glm130b") or case in ("gmask", "mask", "padded")
]
jitted = jax.jit(apply, static_argnums=0)


def golden_config(kind: str) -> GLMConfig:
    """Read the config of a golden set."""
    sizes = json.loads((GOLDENS / kind / "config.json").read_text())
    original = kind == "glm10b_style"
    return GLMConfig(
        num_layers=sizes["num_layers"],
        hidden_size=sizes["hidden_size"],
        num_heads=sizes["num_attention_heads"],
        ffn_size=sizes["inner_hidden_size"],
        vocab_size=sizes["vocab_size"],
        max_length=sizes["max_sequence_length"],
        norm="pre" if original else "deepnorm",
        position="learned_2d" if original else "rope",
        activation="gelu_tanh" if original else "geglu",
    )


@functools.cache
def golden(kind: str, name: str) -> Mapping[str, np.ndarray]:
    with np.load(GOLDENS / kind / f"{name}.npz") as arrays:
        return dict(arrays)


@functools.cache
def loaded(checkpoint: str) -> tuple[GLMConfig, Any]:
    cfg = golden_config(checkpoint.split("/")[0])
    return cfg, sat.load(GOLDENS / checkpoint, cfg)


@pytest.mark.parametrize("checkpoint, case", CASES)
def test_logits(checkpoint: str, case: str) -> None:
    cfg, params = loaded(checkpoint)
    arrays = golden(checkpoint.split("/")[0], "cases")
    tokens, positions, blocked, valid, expected = (
        arrays[f"{case}/{name}"] for name in ("tokens", "position_ids", "blocked", "valid", "logits")
    )
    logits = np.asarray(jitted(cfg, params, tokens, positions, ~blocked))
    assert logits.dtype == np.float32 and logits.shape == expected.shape
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=LOGITS)


def test_every_case_is_tested() -> None:
    for kind in ("glm130b", "glm10b_style"):
        names = {key.split("/")[0] for key in golden(kind, "cases")}
        assert names == {case for checkpoint, case in CASES if checkpoint.startswith(kind)}


def test_float16_rotary_tables_are_those_of_the_released_code() -> None:
    cfg, params = loaded("glm130b/ckpt_tp1")
    arrays = golden("glm130b", "cases")
    inputs = arrays["long/tokens"], arrays["long/position_ids"], ~arrays["long/blocked"]
    half = dataclasses.replace(cfg, rope_angles="float16")
    expected = arrays["long/logits_fp16_inv_freq"]
    np.testing.assert_allclose(jitted(half, params, *inputs), expected, rtol=0, atol=LOGITS)
    assert np.abs(jitted(cfg, params, *inputs) - expected).max() > 10 * LOGITS


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("checkpoint", CHECKPOINTS)
def test_loss_and_gradients(checkpoint: str, tmp_path: Path) -> None:
    cfg, params = loaded(checkpoint)
    arrays = golden(checkpoint.split("/")[0], "train")
    batch = {name[6:]: jnp.asarray(array) for name, array in arrays.items() if name.startswith("batch/")}

    def loss(params: Any) -> tuple[jax.Array, Any]:
        logits = apply(cfg, params, batch["tokens"], batch["position_ids"], ~batch["blocked"])  # [B, S, V]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], axis=-1)[..., 0]  # [B, S]
        losses = -chosen * batch["loss_mask"]  # [B, S]
        return losses.sum() / batch["loss_mask"].sum(), (logits, losses)

    (value, (logits, losses)), gradients = jax.jit(jax.value_and_grad(loss, has_aux=True))(params)
    assert abs(value - arrays["loss"]) < LOSS
    np.testing.assert_allclose(losses, arrays["token_ce"], rtol=0, atol=LOGITS)
    valid = arrays["batch/valid"]
    np.testing.assert_allclose(np.asarray(logits)[valid], arrays["logits"][valid], rtol=0, atol=LOGITS)
    sat.save(tmp_path / "gradients", cfg, gradients, tensor_parallel=1, iteration=0)  # converts to the official names
    ours = sat.read_tensors(tmp_path / "gradients")
    expected = {name.removeprefix("grad/"): array for name, array in arrays.items() if name.startswith("grad/")}
    assert ours.keys() == expected.keys()
    for name, array in expected.items():
        worst = np.abs(ours[name] - array).max()
        assert worst <= GRADIENT * np.abs(array).max(), (name, worst)


def prompts(checkpoint: str) -> list[str]:
    return sorted({key.split("/")[0] for key in golden(checkpoint.split("/")[0], "decode")})


@pytest.mark.parametrize("checkpoint, prompt", [(c, p) for c in CHECKPOINTS for p in prompts(c)])
def test_greedy_decoding_by_full_recomputation(checkpoint: str, prompt: str) -> None:
    cfg, params = loaded(checkpoint)
    arrays = golden(checkpoint.split("/")[0], "decode")
    expected, margin = arrays[f"{prompt}/generated"], arrays[f"{prompt}/margin"]
    context = len(arrays[f"{prompt}/prompt"]) - 1  # without sop
    positions = arrays[f"{prompt}/position_ids"][None]  # [1, S] or [1, 2, S]
    length = positions.shape[-1]
    places = np.arange(length)
    allowed = (places <= places[:, None]) | (places < context)  # [S, S]
    tokens = np.zeros(length + 1, np.int32)
    tokens[: context + 1] = arrays[f"{prompt}/prompt"]
    for turn in range(len(expected)):
        logits = jitted(cfg, params, tokens[None, :length], positions, allowed[None])[0, context + turn]  # [V]
        for name in {0: ["first_logits"], len(expected) - 1: ["last_logits"]}.get(turn, []):
            if f"{prompt}/{name}" in arrays:
                np.testing.assert_allclose(logits, arrays[f"{prompt}/{name}"], rtol=0, atol=LOGITS)
        if margin[turn] > 2 * LOGITS:
            assert int(jnp.argmax(logits)) == expected[turn], turn
        tokens[context + 1 + turn] = expected[turn]
