"""Contexts and whole rows that are long enough for blocks of attention, against dense attention without a mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config.model import Position
from glm_jax.engine import decode, weights
from glm_jax.engine.decode import Prompts
from glm_jax.engine.weights import DecodeConfig
from glm_jax.model import GLMConfig, apply, apply_cached, attention_cores, init, init_cache, layered
from glm_jax.parallel import mesh as meshes
from glm_jax.planning import decode_shapes

LENGTH, ROOM, LENGTHS = 256, 288, (256, 150, 3)


@pytest.mark.parametrize("position", ["rope", "alibi"])
def test_long_contexts_give_the_cache_and_the_losses_of_dense_attention(
    position: Position, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention_cores, "DENSE", LENGTH - 1)
    cfg = GLMConfig(2, 16, 2, 24, 40, max_length=ROOM, position=position, attention_dropout=0.1)
    assert attention_cores.choose(cfg, "cpu", LENGTH, forward_only=True) == "blockwise"
    mesh, engine = meshes.build(dict.fromkeys(meshes.AXES, 1)), DecodeConfig(cfg, cfg.vocab_size)
    params = jax.tree.map(lambda array: array * 2, init(cfg, jax.random.key(0)))
    placed = weights.place(engine, mesh, params)
    random, places, lengths = np.random.default_rng(0), np.arange(ROOM), np.array(LENGTHS)[:, None]
    tokens, targets = random.integers(0, 40, (2, len(LENGTHS), LENGTH)).astype(np.int32)
    positions = np.where(places < lengths, places, lengths // 2)
    allowed = (places[:, None] >= places) | (places < lengths[:, None])  # [B, T, T]

    def grouped(*arrays: Any) -> list[Any]:
        return [jnp.asarray(array)[None] for array in arrays]

    cache = decode.prefill(engine, mesh, placed, Prompts(*grouped(tokens, positions, lengths[:, 0])))
    nothing, start = jnp.zeros((3, 0), jnp.int32), jnp.zeros(3, jnp.int32)
    dense = jax.jit(apply_cached, static_argnums=0)
    _, expected = dense(
        cfg, layered(params), tokens, positions, allowed[:, :LENGTH], init_cache(cfg, 3, ROOM), start, nothing
    )
    for found, exact in zip(jax.tree.leaves(cache), jax.tree.leaves(expected), strict=True):
        np.testing.assert_allclose(found[0], exact, rtol=0, atol=1e-5 * float(jnp.abs(exact).max()))

    everywhere = np.broadcast_to(places[:LENGTH], (3, LENGTH))
    prompts = Prompts(*grouped(tokens, positions[:, :LENGTH], lengths[:, 0]))
    logits = jax.jit(apply, static_argnums=0)(cfg, params, tokens, positions[:, :LENGTH], allowed[:, :LENGTH, :LENGTH])
    targets[0] = jnp.argmax(logits[0], -1)
    losses, likeliest = decode.token_losses(engine, mesh, placed, prompts, *grouped(everywhere, targets))
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.asarray(targets)[..., None], -1)[..., 0]
    np.testing.assert_allclose(losses[0], -chosen, rtol=0, atol=2e-5)
    np.testing.assert_array_equal(likeliest[0], targets == jnp.argmax(logits, -1))


def test_a_long_context_needs_no_scores_of_all_pairs() -> None:
    cfg, length = GLMConfig(2, 32, 4, 48, 64, max_length=2048), 2048  # the last layer gives the cache alone
    mesh, engine = meshes.build(dict.fromkeys(meshes.AXES, 1)), DecodeConfig(cfg, cfg.vocab_size)
    batch = decode_shapes.Batch(groups=1, rows=2, room=length)
    shapes = decode_shapes.prefill_arguments(engine, mesh, decode_shapes.param_shapes(cfg), batch)
    memory: Any = decode.prefill.lower(engine, mesh, *shapes).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 0.1 * 2 * 4 * length**2 * 4
