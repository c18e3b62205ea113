"""The embedding gradient shrink on both paths of the tied embedding, against jax.grad of each path alone."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.rows import Rows
from glm_jax.engine import passes
from glm_jax.engine.bind import EngineConfig
from glm_jax.model import GLMConfig
from glm_jax.model.transformer import blocks, embed, head, position_terms
from glm_jax.parallel import mesh

pytestmark = pytest.mark.slow

MODEL = GLMConfig(2, 16, 2, 24, 32, max_length=8, attention_dropout=0.0, hidden_dropout=0.0)
CONFIG = EngineConfig(MODEL, num_tokens=32, objectives=len(OBJECTIVES))
ALPHA = 0.25


def make_batch() -> Rows[np.ndarray]:
    draw, rows, length = np.random.default_rng(0), 4, 8
    return Rows(
        tokens=draw.integers(0, 32, (rows, length), np.int32),
        targets=draw.integers(0, 32, (rows, length), np.int32),
        positions=np.broadcast_to(np.arange(length, dtype=np.int32), (rows, length)),
        segments=np.ones((rows, length), np.int32),
        context=np.broadcast_to(np.arange(length) < 4, (rows, length)),
        loss_mask=np.broadcast_to(np.arange(length) >= 4, (rows, length)).astype(np.float32),
        objective=np.zeros(rows, np.int32),
        source=np.zeros(rows, np.int32),
    )


def by_path(params: Any, batch: Rows[jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the word embedding's gradients through the input and through the head, as if these were two matrices."""

    def mean_loss(entry: jax.Array, tied: jax.Array) -> jax.Array:
        below, above = ({**params, "embedding": {**params["embedding"], "word": word}} for word in (entry, tied))
        allowed = model.Visibility(batch.segments, batch.context).dense()
        x = embed(MODEL, below, batch.tokens, batch.positions)  # [B, S, D]
        x = blocks(MODEL, params["blocks"], x, allowed, position_terms(MODEL, batch.positions, x.dtype))
        losses = -jnp.take_along_axis(jax.nn.log_softmax(head(MODEL, above, x)), batch.targets[..., None], -1)
        return (losses[..., 0] * batch.loss_mask).sum() / batch.loss_mask.sum()

    word = params["embedding"]["word"]
    return jax.jit(jax.grad(mean_loss, (0, 1)))(word, word)


@pytest.mark.parametrize("logits", [False, True])
def test_alpha_multiplies_the_gradient_of_its_paths_alone(mesh_sizes: dict[str, int], logits: bool) -> None:
    grid, batch = mesh.build(mesh_sizes), make_batch()
    params = model.init(MODEL, jax.random.key(0))
    entry, tied = by_path(params, jax.tree.map(jnp.asarray, batch))
    cfg = dataclasses.replace(CONFIG, shrink_logits=logits)
    found = jax.jit(lambda batch: passes.value_and_grad(cfg, grid, params, batch, None, ALPHA).gradients)(
        mesh.place(grid, batch, 2)
    )
    expected = ALPHA * entry + (ALPHA if logits else 1.0) * tied
    np.testing.assert_allclose(found["embedding"]["word"], expected, atol=1e-6)
    assert np.abs(entry).max() > 1e-3 and np.abs(tied).max() > 1e-3
