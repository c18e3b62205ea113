"""GLM in float64 numpy on one page, written from the papers without regard for speed: the reference for model/.

Post-LN and DeepNorm are written as in the paper, LN(alpha x + f(x)), not shifted as in the released code; their first
norm is the one on the embedding. Matrices have the layout of glm_jax.model.init; `layer` below is one block's.

Dropout (Srivastava et al. 2014) takes its masks from the caller; `dropout_masks` draws the same ones as training.
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

erf = np.vectorize(math.erf, otypes=[np.float64])


def layer_norm(params: Any, x: np.ndarray, epsilon: float) -> np.ndarray:
    return (x - x.mean(-1, keepdims=True)) / np.sqrt(x.var(-1, keepdims=True) + epsilon) * params["scale"] + params[
        "bias"
    ]


class Masks(NamedTuple):
    """Which entries dropout keeps in one row, bool; in order of use."""

    embedding: np.ndarray  # [S, D]
    probabilities: np.ndarray  # [L, N, S, S]
    attention: np.ndarray  # [L, S, D]
    feedforward: np.ndarray  # [L, S, D]


def drop(x: np.ndarray, kept: np.ndarray | None, rate: float) -> np.ndarray:
    return x if kept is None else x * kept / (1 - rate)


def dropout_masks(cfg: Any, key: jax.Array, batch: int, length: int, block: int | None = None) -> list[Masks]:
    """Draw masks by the rule in model/layers.py: keys by row, layer (0 is the embedding), sublayer and place.

    With `block`, those of probabilities are drawn by blocks of so many queries and keys, by the rule of the blockwise
    core: keys by row, layer, sublayer, head, block of queries and block of keys.
    """
    drawn = jax.device_get(_draw(cfg, key, batch, length, block))
    return [Masks(*(array[index] for array in drawn)) for index in range(batch)]


def block_mask(key: jax.Array, rate: float, length: int, block: int) -> jax.Array:
    """Draw the mask [S, S] of one row and head."""
    blocks = jnp.arange(length // block)

    def draw(i: jax.Array, j: jax.Array) -> jax.Array:  # [Q, T]
        return jax.random.bernoulli(jax.random.fold_in(jax.random.fold_in(key, i), j), 1 - rate, (block, block)).T

    drawn = jax.vmap(jax.vmap(draw, (None, 0)), (0, None))(blocks, blocks)  # [S / Q, S / T, Q, T]
    return drawn.swapaxes(1, 2).reshape(length, length)


@partial(jax.jit, static_argnums=(0, 2, 3, 4))
def _draw(cfg: Any, key: jax.Array, batch: int, length: int, block: int | None) -> tuple[jax.Array, ...]:
    width, square, layers = (cfg.hidden_size,), (length, length), np.arange(1, cfg.num_layers + 1)

    def draw(key: jax.Array, path: tuple[Any, ...], places: int, rate: float, shape: tuple[int, ...]) -> jax.Array:
        for index in path:
            key = jax.random.fold_in(key, index)
        keys = jax.vmap(lambda place: jax.random.fold_in(key, place))(np.arange(places))
        if block is not None and shape == square:
            return jax.vmap(partial(block_mask, rate=rate, length=length, block=block))(keys)
        return jax.vmap(lambda key: jax.random.bernoulli(key, 1 - rate, shape))(keys)

    def row(index: jax.Array) -> tuple[jax.Array, ...]:
        start, hidden, attention = jax.random.fold_in(key, index), cfg.hidden_dropout, cfg.attention_dropout
        return (
            draw(start, (0,), length, hidden, width),
            jax.vmap(lambda layer: draw(start, (layer, 0), cfg.num_heads, attention, square))(layers),
            jax.vmap(lambda layer: draw(start, (layer, 1), length, hidden, width))(layers),
            jax.vmap(lambda layer: draw(start, (layer, 2), length, hidden, width))(layers),
        )

    return jax.vmap(row)(jnp.arange(batch))


def slopes(heads: int) -> np.ndarray:
    """ALiBi (Press et al. 2022, section 3): a geometric sequence from 2^(-8/n); in between for other head counts."""
    n = 1 << (heads.bit_length() - 1)
    extra = [2 ** (-8 * (2 * i + 1) / (2 * n)) for i in range(heads - n)]
    return np.array([2 ** (-8 * (i + 1) / n) for i in range(n)] + extra)


def alibi_distance(p: np.ndarray) -> np.ndarray:
    """|p_i - p_j|, plus |i - j| if i and j are in the same run of equal positions (a target block)."""
    distance = np.abs(p[:, None] - p[None, :])
    for i in range(len(p)):
        for j in range(len(p)):
            if len(set(p[min(i, j) : max(i, j) + 1])) == 1:
                distance[i, j] += abs(i - j)
    return distance


def rotate(x: np.ndarray, p: np.ndarray, base: float) -> np.ndarray:
    """RoPE (Su et al. 2021) on [S, K]: the pair (j, j + K/2) is a complex number, rotated by p base^(-2j/K)."""
    half = x.shape[-1] // 2
    turned = (x[:, :half] + 1j * x[:, half:]) * np.exp(1j * p[:, None] * base ** (-np.arange(half) / half))
    return np.concatenate([turned.real, turned.imag], -1)


def head_scores(cfg: Any, layer: Any, x: np.ndarray, p: np.ndarray, head: int) -> np.ndarray:
    """The scores of one head before ALiBi's distance and masks: x [S, D], p [S] or [2, S] -> [S, S]."""
    kernel, bias = layer["qkv"]["kernel"], layer["qkv"]["bias"]
    q, k = (x @ kernel[:, head, part] + bias[head, part] for part in range(2))
    if cfg.qk_norm:
        q, k = (
            layer_norm({**layer[norm], "bias": 0}, z, cfg.norm_epsilon)
            for norm, z in (("query_norm", q), ("key_norm", k))
        )
    if cfg.position == "rope":
        q, k = rotate(q, p, cfg.rope_base), rotate(k, p, cfg.rope_base)
    return q @ k.T / np.sqrt(q.shape[-1])


def attention(
    cfg: Any, layer: Any, x: np.ndarray, p: np.ndarray, allowed: np.ndarray, kept: np.ndarray | None
) -> np.ndarray:
    """Attention of one row: x [S, D], p [S] or [2, S], allowed [S, S], kept [N, S, S] -> [S, D]."""
    kernel, bias = layer["qkv"]["kernel"], layer["qkv"]["bias"]
    distance = alibi_distance(p) if cfg.position == "alibi" else None
    output = np.zeros_like(x)
    for head in range(cfg.num_heads):
        v = x @ kernel[:, head, 2] + bias[head, 2]
        scores = head_scores(cfg, layer, x, p, head)
        if distance is not None:
            scores = scores - slopes(cfg.num_heads)[head] * distance
        weights = np.exp(scores - scores.max(-1, keepdims=True)) * allowed
        weights = weights / weights.sum(-1, keepdims=True)
        weights = drop(weights, None if kept is None else kept[head], cfg.attention_dropout)
        output += weights @ v @ layer["output"]["kernel"][head]
    return output + layer["output"]["bias"]


def feedforward(cfg: Any, layer: Any, x: np.ndarray) -> np.ndarray:
    """Feed-forward: x [S, D] -> [S, D]; the second half of a GeGLU is the gate."""
    up, down = layer["up"], layer["down"]
    u = [x @ up["kernel"][:, part] + up["bias"][part] for part in range(up["bias"].shape[0])]
    if cfg.activation == "geglu":
        y = u[0] * u[1] * (1 + erf(u[1] / np.sqrt(2))) / 2
    elif cfg.activation == "gelu":
        y = u[0] * (1 + erf(u[0] / np.sqrt(2))) / 2
    else:
        y = u[0] * (1 + np.tanh(np.sqrt(2 / np.pi) * (u[0] + 0.044715 * u[0] ** 3))) / 2
    return y @ down["kernel"] + down["bias"]


def pick(tree: Any, index: int) -> Any:
    return {name: pick(leaf, index) for name, leaf in tree.items()} if isinstance(tree, dict) else tree[index]


def forward(
    cfg: Any,
    params: Any,
    tokens: np.ndarray,
    positions: np.ndarray,
    allowed: np.ndarray,
    masks: list[Masks] | None = None,
) -> np.ndarray:
    """tokens [B, S], positions [B, S] or [B, 2, S], allowed [B, S, S], masks by row -> logits [B, S, V].

    The head is the word embedding, unless `params["head"]` holds another [V, D].
    """
    of_rows = masks or [None] * len(tokens)
    return np.stack([row(cfg, params, *inputs) for inputs in zip(tokens, positions, allowed, of_rows, strict=True)])


def row(
    cfg: Any, params: Any, tokens: np.ndarray, p: np.ndarray, allowed: np.ndarray, masks: Masks | None
) -> np.ndarray:
    word = params["embedding"]["word"]
    head = params.get("head", word)
    x = word[tokens]
    if cfg.position == "learned_2d":
        x = x + params["embedding"]["position"][p[0]] + params["embedding"]["block_position"][p[1]]
    if cfg.embedding_norm:
        x = layer_norm(params["embedding"]["norm"], x, cfg.norm_epsilon)
    x = drop(x, None if masks is None else masks.embedding, cfg.hidden_dropout)
    sublayers, before, after = [], [], []
    for index in range(cfg.num_layers):
        layer = pick(params["blocks"], index)
        probabilities, mixed, fed = (None, None, None) if masks is None else [kept[index] for kept in masks[1:]]

        def attend(x: np.ndarray, layer: Any = layer, inside: Any = probabilities, kept: Any = mixed) -> np.ndarray:
            return drop(attention(cfg, layer["attention"], x, p, allowed, inside), kept, cfg.hidden_dropout)

        def feed(x: np.ndarray, layer: Any = layer, kept: Any = fed) -> np.ndarray:
            return drop(feedforward(cfg, layer["feedforward"], x), kept, cfg.hidden_dropout)

        sublayers += [attend, feed]
        before += [layer["attention_norm"], layer["feedforward_norm"]]
        after += [layer.get("attention_output_norm"), layer.get("feedforward_output_norm")]
    norms = [*before, params["final_norm"]]
    alpha = np.sqrt(2 * cfg.num_layers) if cfg.norm == "deepnorm" else 1
    if cfg.norm in ("post", "deepnorm"):
        x = layer_norm(norms[0], x, cfg.norm_epsilon)
        for f, norm in zip(sublayers, norms[1:], strict=True):
            x = layer_norm(norm, alpha * x + f(x), cfg.norm_epsilon)
        return x @ head.T
    for f, norm, norm_after in zip(sublayers, before, after, strict=True):
        y = f(layer_norm(norm, x, cfg.norm_epsilon))
        x = x + (layer_norm(norm_after, y, cfg.norm_epsilon) if cfg.norm == "sandwich" else y)
    return layer_norm(norms[-1], x, cfg.norm_epsilon) @ head.T
