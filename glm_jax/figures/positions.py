"""Figures of what the three kinds of positions tell attention, computed by the model's own functions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure

from glm_jax.figures import style
from glm_jax.model import GLMConfig, init
from glm_jax.model.positions import alibi_distance, alibi_slopes, rotary_tables, rotate
from glm_jax.model.transformer import embed


def rotary_similarity(cfg: GLMConfig, positions: np.ndarray) -> np.ndarray:
    """Return the cosines between a head's vectors of ones, rotated to `positions` [S]: [S, S].

    This is the mean of cos(distance x frequency) over the frequencies: the effect of RoPE alone on equal contents.
    """
    ones = jnp.ones((1, len(positions), 1, cfg.head_dim))  # [B, S, N, K]
    turned = rotate(ones, rotary_tables(cfg, jnp.asarray(positions)[None], jnp.dtype("float32")))[0, :, 0]  # [S, K]
    return np.asarray(turned @ turned.T) / cfg.head_dim


def alibi_bias(cfg: GLMConfig, positions: np.ndarray) -> np.ndarray:
    """Return what ALiBi adds to each head's scores at `positions` [S]: [N, S, S]."""
    distance = np.asarray(alibi_distance(jnp.asarray(positions)[None]).dense()[0])  # [S, S]
    return -np.array(alibi_slopes(cfg.num_heads))[:, None, None] * distance


def learned_similarity(cfg: GLMConfig, streams: np.ndarray, seed: int) -> np.ndarray:
    """Return the cosines between the vectors that two streams [2, S] add to the words, at initialisation: [S, S]."""
    params = init(cfg, jax.random.key(seed))
    still = params | {"embedding": params["embedding"] | {"word": jnp.zeros_like(params["embedding"]["word"])}}
    tokens = jnp.zeros((1, streams.shape[1]), jnp.int32)  # [B, S]
    added = np.asarray(embed(cfg, still, tokens, jnp.asarray(streams)[None])[0])  # [S, D]
    unit = added / np.linalg.norm(added, axis=1, keepdims=True)
    return unit @ unit.T


def against_distance(configs: Mapping[str, GLMConfig], heads: GLMConfig, farthest: int) -> Figure:
    """Draw the effect of distances from 0 to `farthest` tokens under RoPE and ALiBi.

    Args:
        configs: models by name, whose rotary similarity is drawn.
        heads: the model whose ALiBi biases are drawn, a line per head, as factors on unnormalised weights.
        farthest: tokens.
    """
    made, (left, right) = style.figure(1, 2, 4.0, 3.0)
    positions = np.arange(farthest + 1)
    for name, cfg in configs.items():
        left.plot(positions, rotary_similarity(cfg, positions)[0], linewidth=1.4, label=name)
    style.finish(left, "distance, tokens", "cosine of equal contents", "RoPE")
    for number, bias in enumerate(alibi_bias(heads, positions)):
        slope = alibi_slopes(heads.num_heads)[number]
        right.plot(positions, np.exp(bias[0]), linewidth=1.4, label=f"slope 1/{1 / slope:g}")
    right.set_ylim(-0.05, 1.45)
    style.finish(right, "distance, tokens", "factor on the weight", f"ALiBi, {heads.num_heads} heads", legend=False)
    right.legend(frameon=False, fontsize=8, ncols=2, loc="upper right")
    return made


def as_matrices(panels: Mapping[str, np.ndarray], starts: Sequence[int], names: Sequence[str]) -> Figure:
    """Draw matrices [S, S] of queries x keys, each in its own panel and scale. NaN, for keys not seen, stays white.

    Args:
        panels: by title.
        starts: the places where a part of the row begins, which are marked by lines.
        names: of the parts, one more than `starts`.
    """
    made, axes = style.figure(1, len(panels), 3.5, 3.2)
    for axis, (title, values) in zip(axes, panels.items(), strict=True):
        image = axis.imshow(values, cmap=style.MAP)
        for start in starts:
            axis.axhline(start - 0.5, color=style.INK, linewidth=0.8)
            axis.axvline(start - 0.5, color=style.INK, linewidth=0.8)
        edges = [0, *starts, len(values)]
        middles = [(first + last - 1) / 2 for first, last in zip(edges, edges[1:], strict=False)]
        axis.set_xticks(middles, names)
        axis.set_yticks(middles, names, rotation=90, verticalalignment="center")
        made.colorbar(image, ax=axis, shrink=0.8)
        style.finish(axis, "key", "query" if axis is axes[0] else "", title, legend=False)
        axis.grid(visible=False)
    return made
