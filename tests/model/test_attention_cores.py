"""The choice of an attention core, and the official logits from each."""

from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.model import GLMConfig, Visibility, apply
from glm_jax.model.attention_cores import CORES, Name, choose, platform
from tests.model.test_attention_fused import FUSED, emulate
from tests.model.test_goldens import LOGITS, golden, loaded


@pytest.mark.parametrize(
    "on, length, compute, options, expected",
    [
        ("cpu", 512, "float32", {}, "blockwise"),
        ("cpu", 128, "float32", {}, "reference"),  # a single block
        ("cpu", 544, "float32", {}, "blockwise"),  # blocks of 32, which still take half the CPU seconds
        ("cpu", 250, "float32", {}, "reference"),  # blocks of 2
        ("cpu", 512, "float32", {"attention_dropout": 0.1}, "blockwise"),
        ("cpu", 512, "float32", {"position": "alibi"}, "blockwise"),
        ("cpu", 512, "float16", {"softmax_dtype": "float16"}, "reference"),
        ("tpu", 512, "float32", {}, "pallas"),
        ("tpu", 128, "bfloat16", {"score_scaling": True}, "pallas"),
        ("tpu", 512, "float16", {}, "reference"),  # TPUs have none
        ("tpu", 544, "bfloat16", {}, "reference"),  # blocks of 32
        ("tpu", 512, "bfloat16", {"attention_dropout": 0.1}, "reference"),
        ("tpu", 512, "bfloat16", {"position": "alibi"}, "reference"),
        ("cuda", 512, "float32", {}, "reference"),
        ("cuda", 512, "bfloat16", {}, "cudnn"),
        ("cuda", 250, "float16", {"pb_relax": 32.0}, "cudnn"),
        ("cuda", 251, "float16", {}, "reference"),
        ("cuda", 512, "float16", {"softmax_dtype": "float16"}, "reference"),
        ("cuda", 512, "float16", {"num_heads": 1}, "cudnn"),
        ("cuda", 512, "float16", {"num_heads": 32}, "reference"),  # 4 a head
        ("cuda", 512, "float16", {"hidden_size": 512}, "reference"),  # 256 a head
        ("cuda", 512, "float16", {"attention_dropout": 0.1}, "reference"),
        ("cuda", 512, "float16", {"position": "alibi"}, "reference"),
        ("gpu", 512, "float16", {}, "reference"),  # an old one, or AMD's
        ("", 512, "float32", {}, "reference"),
    ],
)
def test_the_choice(on: str, length: int, compute: str, options: dict[str, Any], expected: str) -> None:
    sizes: dict[str, Any] = {"num_layers": 1, "hidden_size": 128, "num_heads": 2, "ffn_size": 8, "vocab_size": 64}
    assert choose(GLMConfig(**(sizes | options)), on, length, compute) == expected


def test_short_contexts_are_dense_on_cpus() -> None:
    cfg = GLMConfig(1, 8, 2, 8, 64)
    cores = [choose(cfg, "cpu", length, forward_only=True) for length in (256, 512, 1024)]
    assert cores == ["reference", "reference", "blockwise"]


@pytest.mark.parametrize("capability, expected", [("9.0", "cuda"), ("8.0", "cuda"), ("7.5", "gpu"), ("gfx90a", "gpu")])
def test_a_gpu_is_one_with_fused_attention_or_not(
    capability: str, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    device: Any = SimpleNamespace(platform="gpu", compute_capability=capability)
    described: Any = SimpleNamespace(platform="cuda", compute_capability=capability)
    assert platform(device) == platform(described) == "gpu"  # on a machine without
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert platform(device) == expected
    assert platform(jax.devices("cpu")[0]) == "cpu"


@pytest.mark.parametrize("core", ["blockwise", *FUSED])
@pytest.mark.parametrize("checkpoint", ["glm130b/ckpt_tp1", "glm10b_style/ckpt_tp1"])
def test_the_official_logits_come_out(checkpoint: str, core: Name, monkeypatch: pytest.MonkeyPatch) -> None:
    emulate(monkeypatch)
    cfg, params = loaded(checkpoint)
    arrays = golden(checkpoint.split("/")[0], "cases")
    tokens, positions, blocked, valid, expected = (
        arrays[f"gmask/{name}"] for name in ("tokens", "position_ids", "blocked", "valid", "logits")
    )
    length = tokens.shape[1]
    whole = 64  # tokens of a row, so that it has blocks; those behind are padding, which no other token sees
    context = (~blocked).all(1) & (~blocked).any(1)  # [B, S]: seen by all
    segments = np.pad(np.ones_like(tokens), ((0, 0), (0, whole - length)))
    visibility = Visibility(jnp.asarray(segments), jnp.asarray(np.pad(context, ((0, 0), (0, whole - length)))))
    np.testing.assert_array_equal(np.asarray(visibility.dense())[:, :length, :length], ~blocked)

    def padded(array: np.ndarray) -> jax.Array:
        return jnp.pad(array, [*[(0, 0)] * (array.ndim - 1), (0, whole - length)])

    logits = apply(cfg, params, padded(tokens), padded(positions), visibility, core=CORES[core])
    np.testing.assert_allclose(np.asarray(logits)[:, :length][valid], expected[valid], rtol=0, atol=LOGITS)
