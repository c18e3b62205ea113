"""Logits with a cache equal those of whole rows, for every norm and position, whatever the lengths of the rows."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config.model import Norm, Position
from glm_jax.model import GLMConfig, apply, apply_cached, init, init_cache, layered

CONTEXTS, LENGTH, ROOM = (3, 6, 5), 10, 12
VARIANTS: list[tuple[Norm, Position]] = [
    ("deepnorm", "rope"),
    ("deepnorm", "alibi"),
    ("pre", "learned_2d"),
    ("post", "rope"),
    ("sandwich", "rope"),
]  # with norms on queries and keys under post


def rows(position: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return tokens [B, S], positions of whole rows [B, T] or [B, 2, T], and which key a query sees [B, T, T]."""
    generator = np.random.default_rng(0)
    tokens = generator.integers(0, 40, (len(CONTEXTS), LENGTH)).astype(np.int32)
    places = np.arange(ROOM)
    first = np.stack([np.where(places < size, places, size // 2) for size in CONTEXTS])
    second = np.stack([np.maximum(places - size + 1, 0) for size in CONTEXTS])
    positions = np.stack([first, second], axis=1) if position == "learned_2d" else first
    allowed = np.stack([(places[:, None] >= places) | (places < size) for size in CONTEXTS])
    return tokens, positions.astype(np.int32), allowed


@pytest.mark.parametrize("norm, position", VARIANTS)
def test_cached_logits_equal_those_of_whole_rows(norm: Norm, position: Position) -> None:
    cfg = GLMConfig(2, 16, 2, 24, 40, max_length=16, norm=norm, position=position, qk_norm=norm == "post")
    params = jax.tree.map(lambda array: array * 2, init(cfg, jax.random.key(0)))
    tokens, positions, allowed = rows(position)
    here = (..., slice(LENGTH))
    whole = jax.jit(apply, static_argnums=0)(cfg, params, tokens, positions[here], allowed[:, :LENGTH, :LENGTH])
    close = float(jnp.abs(whole).max()) * 1e-5
    step = jax.jit(apply_cached, static_argnums=0)
    split, start = layered(params), jnp.zeros(3, jnp.int32)
    # the contexts, of which some are shorter than what is read; the logits of their last tokens, and no others
    sizes = jnp.asarray(CONTEXTS)
    seen = jnp.asarray(allowed[:, :6]) & (jnp.arange(ROOM) < 6)
    last, cache = step(cfg, split, tokens[:, :6], positions, seen, init_cache(cfg, 3, ROOM), start, sizes[:, None] - 1)
    assert last.shape == (3, 1, 40) and cache.keys[0].shape == (1, 3, 2, ROOM, 8)
    np.testing.assert_allclose(last[:, 0], whole[jnp.arange(3), sizes - 1], atol=close)
    for turn in range(LENGTH - max(CONTEXTS)):  # a token of each row, at places of its own
        at = np.asarray(CONTEXTS) + turn
        one = np.arange(3)
        logits, cache = step(
            cfg, split, tokens[one, at][:, None], positions, allowed[one, at][:, None], cache, jnp.asarray(at),
            jnp.zeros((3, 1), jnp.int32),
        )  # fmt: skip
        np.testing.assert_allclose(logits[:, 0], whole[one, at], atol=close)


def test_no_logits_are_made_where_none_are_asked_for() -> None:
    cfg = GLMConfig(1, 16, 2, 24, 40, max_length=16)
    split = jax.eval_shape(lambda: layered(init(cfg, jax.random.key(0))))
    tokens, positions, allowed = rows("rope")
    cache = init_cache(cfg, 3, ROOM)
    arguments = (split, tokens, positions, allowed[:, :LENGTH], cache, jnp.zeros(3, jnp.int32))
    nowhere = jnp.zeros((3, 0), jnp.int32)
    traced = jax.make_jaxpr(lambda *rest: apply_cached(cfg, *rest))(*arguments, nowhere)
    products = [equation.outvars[0].aval.shape for equation in traced.jaxpr.eqns  # pyright: ignore (no type)
                if equation.primitive.name == "dot_general"]  # fmt: skip
    assert not [shape for shape in products if 40 in shape and 0 not in shape]
