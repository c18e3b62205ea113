"""GLM itself: embed, block, blocks (a scan over block), head, and `apply`, which runs them all."""

from __future__ import annotations

import functools
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from glm_jax.config.model import GLMConfig
from glm_jax.model import attention_core
from glm_jax.model.attention import MEASURES, Attention, LayerCache
from glm_jax.model.attention_core import Core
from glm_jax.model.feedforward import FeedForward
from glm_jax.model.layers import (
    NORMAL_STDDEV,
    ONE_DEVICE,
    LayerNorm,
    TensorAxis,
    dropout,
    fold_in,
    param,
    row_keys,
    run,
    xavier_stddev,
)
from glm_jax.model.positions import PositionTerms, position_terms
from glm_jax.model.residual import residual_update
from glm_jax.model.visibility import Visibility, queries
from glm_jax.types import Tree

Array = jax.Array
Params = dict[str, Tree]


def shrink_gradient(x: Array, alpha: Array | float | None) -> Array:
    """Return x, with its gradient multiplied by alpha (paper section 3.2); None changes nothing."""
    if alpha is None:
        return x
    alpha = jnp.asarray(alpha, x.dtype)
    return alpha * x + (1 - alpha) * jax.lax.stop_gradient(x)


class Embedding(nn.Module):
    """The word embedding, tied to the head, and the original GLM's two learned position tables."""

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE

    @nn.compact
    def __call__(self, tokens: Array, positions: Array, shrink: Array | float | None) -> Array:
        """tokens [B, S], positions [B, S] or [B, 2, S] -> [B, S, D]; for `shrink` see `embed`."""
        cfg = self.cfg
        word = self._table("word", cfg.vocab_size // self.axis.vocab_shards, "vocab")  # [V, D]
        x = self.axis.lookup(word, tokens)  # [B, S, D]
        x = shrink_gradient(x, shrink)  # [B, S, D]
        if cfg.position == "learned_2d":
            here = jnp.take(positions, self.axis.tokens(tokens.shape[1]), axis=2)  # [B, 2, S]
            x = x + jnp.take(self._table("position", cfg.max_length, None), here[:, 0], axis=0)  # [B, S, D]
            x = x + jnp.take(self._table("block_position", cfg.max_length, None), here[:, 1], axis=0)  # [B, S, D]
        if cfg.embedding_norm:
            x = LayerNorm(cfg.norm_epsilon, name="norm")(x)  # [B, S, D]
        return x

    def _table(self, name: str, rows: int, axis: str | None) -> Array:
        width = self.cfg.hidden_size
        stddev = NORMAL_STDDEV if self.cfg.initialisation == "normal" else xavier_stddev(rows, width)
        return param(self, name, nn.initializers.normal(stddev), (axis, "hidden"), (rows, width))  # [rows, D]


class SublayerParts(NamedTuple):
    """The `Parts` of residual.py for one sublayer of a block."""

    block: Block
    sublayer: str

    @property
    def cfg(self) -> GLMConfig:
        """The model config."""
        return self.block.cfg

    def norm(self, name: str) -> LayerNorm:
        """Return the layer norm `name` of the sublayer."""
        return LayerNorm(self.cfg.norm_epsilon, name=f"{self.sublayer}_{name}")

    def scale(self, initial: float) -> Array:
        """Return the sublayer's learnt scalar []."""
        return param(self.block, f"{self.sublayer}_scale", nn.initializers.constant(initial), (), ())


class Block(nn.Module):
    """Attention and feed-forward, each with its norms, under one of the schemes of residual.py."""

    cfg: GLMConfig
    axis: TensorAxis = ONE_DEVICE
    core: Core = attention_core.reference

    @nn.compact
    def __call__(
        self,
        x: Array,
        allowed: Array | Visibility,
        terms: PositionTerms,
        layer: Array,
        keys: Array | None,
        cache: LayerCache | None,
    ) -> tuple[Array, LayerCache | None]:
        """x [B, S, D], `allowed` of T keys, dropout keys [B] -> [B, S, D] and the layer's cache, extended."""
        cfg = self.cfg
        places = self.axis.tokens(queries(allowed))  # [S]: the tokens of x
        attention = Attention(cfg, self.axis, self.core, name="attention")
        feedforward = FeedForward(cfg, self.axis, name="feedforward")
        grown = cache

        def attend(normed: Array) -> Array:
            nonlocal grown
            mixed, grown = attention(normed, allowed, terms, layer, fold_in(keys, 0), cache)  # [B, S, D]
            return dropout(mixed, cfg.hidden_dropout, fold_in(keys, 1), places)

        def feed(normed: Array) -> Array:
            return dropout(feedforward(normed), cfg.hidden_dropout, fold_in(keys, 2), places)  # [B, S, D]

        for name, sublayer in (("attention", attend), ("feedforward", feed)):
            x = residual_update(x, sublayer, SublayerParts(self, name))  # [B, S, D]
        return x, grown


def _init_boxed(cfg: GLMConfig, key: Array) -> Params:
    """Initialise, with each array in a box that names its logical axes, except the leading L of blocks; see callers."""
    embedding_key, block_key = jax.random.split(key)
    tokens = jnp.zeros((1, 1), jnp.int32)
    positions = jnp.zeros((1, 2, 1) if cfg.position == "learned_2d" else (1, 1), jnp.int32)
    x = jnp.zeros((1, 1, cfg.hidden_size))
    terms = position_terms(cfg, positions, x.dtype)

    def block(layer_key: Array) -> Tree:
        arguments = (x, jnp.ones((1, 1, 1), bool), terms, jnp.int32(0), None, None)
        return Block(cfg).init(layer_key, *arguments)["params"]

    return {
        "embedding": Embedding(cfg).init(embedding_key, tokens, positions, None)["params"],
        "blocks": jax.vmap(block)(jax.random.split(block_key, cfg.num_layers)),
        "final_norm": LayerNorm(cfg.norm_epsilon).init(key, x)["params"],
    }


def init(cfg: GLMConfig, key: Array) -> Params:
    """Initialise float32 params (paper section 2.1 and table 11; see residual.py for the gains).

    Returns:
        Nested dicts: `embedding`, `blocks` (every array stacked on a leading L axis) and `final_norm`.
    """
    return nn.unbox(_init_boxed(cfg, key))


@functools.cache  # tracing a model's initialisation takes 50 ms
def _shapes_boxed(cfg: GLMConfig) -> Params:
    return jax.eval_shape(lambda: _init_boxed(cfg, jax.random.key(0)))


def shapes(cfg: GLMConfig) -> Params:
    """Return the shapes and dtypes of the params, in the tree of `init`."""
    return nn.unbox(_shapes_boxed(cfg))


def logical_axes(cfg: GLMConfig) -> Params:
    """Return the tree of `init` with a tuple of logical axis names (or None) in place of each array.

    parallel/partition.py turns the names, `layers`, `vocab`, `hidden`, `heads` and `ffn`, into mesh axes.
    """
    specs = nn.get_partition_spec(_shapes_boxed(cfg))
    specs["blocks"] = jax.tree.map(
        lambda spec: ("layers", *spec), specs["blocks"], is_leaf=lambda leaf: isinstance(leaf, jax.P)
    )
    return jax.tree.map(tuple, specs, is_leaf=lambda leaf: isinstance(leaf, jax.P | tuple))


def embed(
    cfg: GLMConfig,
    weights: Params,
    tokens: Array,
    positions: Array,
    shrink: Array | float | None = None,
    keys: Array | None = None,
    axis: TensorAxis = ONE_DEVICE,
) -> Array:
    """Embed tokens [B, S] at positions [B, S] (or [B, 2, S]) -> [B, S, D].

    `shrink` is alpha of the embedding gradient shrink (paper section 3.2): it leaves the value as it is and multiplies
    the gradient that reaches the word embedding on this path. `keys` [B] are the rows' dropout keys.
    """
    x = run(Embedding(cfg, axis), weights["embedding"], tokens, positions, shrink)
    return dropout(x, cfg.hidden_dropout, fold_in(keys, 0), axis.tokens(tokens.shape[1]))  # [B, S, D]


def block(
    cfg: GLMConfig,
    layer_weights: Params,
    x: Array,
    allowed: Array | Visibility,
    terms: PositionTerms,
    layer: Array,
    keys: Array | None = None,
    cache: LayerCache | None = None,
    axis: TensorAxis = ONE_DEVICE,
    core: Core = attention_core.reference,
) -> tuple[Array, LayerCache | None]:
    """Run one block: x [B, S, D] -> [B, S, D], and the layer's cache.

    `layer` is its index in the whole model; `keys` [B] are the rows' dropout keys.
    """
    keys = fold_in(keys, layer + 1)  # 0 is the embedding's
    return run(Block(cfg, axis, core), layer_weights, x, allowed, terms, layer, keys, cache)


def largest_score(
    cfg: GLMConfig,
    layer_weights: Params,
    x: Array,
    allowed: Array | Visibility,
    terms: PositionTerms,
    layer: Array,
    axis: TensorAxis = ONE_DEVICE,
) -> Array:
    """Return the largest attention score of a block for its input x [B, S, D]: float32 [], of this member's heads.

    It is the one before ALiBi's distance, see `attention.largest_score`. Arguments as in `block`.
    """
    arguments = (x, allowed, terms, layer, None, None)
    measured: Tree = Block(cfg, axis).apply({"params": layer_weights}, *arguments, mutable=[MEASURES])[1]
    return measured[MEASURES]["attention"]["largest_score"][0]


def blocks(
    cfg: GLMConfig,
    stacked_weights: Params,
    x: Array,
    allowed: Array | Visibility,
    terms: PositionTerms,
    keys: Array | None = None,
    remat: bool = False,
    core: Core = attention_core.reference,
) -> Array:
    """Run the blocks of `stacked_weights` (arrays [L, ...]) in one scan: x [B, S, D] -> [B, S, D].

    With `remat`, only each block's input is kept for the backward pass, which computes the rest again.
    """

    def one(x: Array, scanned: tuple[Params, Array]) -> tuple[Array, None]:
        layer_weights, layer = scanned
        return block(cfg, layer_weights, x, allowed, terms, layer, keys, core=core)[0], None

    layers = jax.tree.leaves(stacked_weights)[0].shape[0]
    one = jax.checkpoint(one) if remat else one
    return jax.lax.scan(one, x, (stacked_weights, jnp.arange(layers)))[0]


def before_logits(
    cfg: GLMConfig,
    weights: Params,
    x: Array,
    axis: TensorAxis = ONE_DEVICE,
    shrink: Array | float | None = None,
) -> tuple[Array, Array]:
    """Return the two factors of the logits: x [B, S, D] after the final norm, and the tied embedding [V, D].

    `shrink` multiplies the gradient that reaches the word embedding on this path, as in `embed`.
    """
    x = axis.enter(run(LayerNorm(cfg.norm_epsilon), weights["final_norm"], x))  # [B, S, D]
    return x, shrink_gradient(weights["embedding"]["word"], shrink)


def head(cfg: GLMConfig, weights: Params, x: Array, axis: TensorAxis = ONE_DEVICE) -> Array:
    """Norm and project with the tied embedding: x [B, S, D] -> float32 logits [B, S, V]."""
    x, word = before_logits(cfg, weights, x, axis)  # [B, S, D], [V, D]
    wide = jnp.promote_types(x.dtype, jnp.float32)
    return jnp.einsum("bsd,vd->bsv", x, word, preferred_element_type=wide)  # [B, S, V]


def apply(
    cfg: GLMConfig,
    params: Params,
    tokens: Array,
    positions: Array,
    allowed: Array | Visibility,
    *,
    shrink: Array | float | None = None,
    key: Array | None = None,
    remat: bool = False,
    core: Core = attention_core.reference,
) -> Array:
    """Run GLM over whole rows.

    Args:
        cfg: the model.
        params: as `init` returns them, in any dtype; it is the dtype of the computation.
        tokens: int32 [B, S].
        positions: int32 [B, S], or [B, 2, S] for learned_2d.
        allowed: which key a query may see: a `Visibility`, or bool [B, S, S], True where it may.
        shrink: alpha of the embedding gradient shrink, see `embed`.
        key: dropout key; row b of the batch draws by its index. None disables dropout.
        remat: compute the inside of blocks again in the backward pass.
        core: of the attention; one that supports `cfg` and `allowed`.

    Returns:
        float32 logits [B, S, V] (float64 for float64 params).
    """
    keys = row_keys(key, jnp.arange(tokens.shape[0]))  # [B]
    x = embed(cfg, params, tokens, positions, shrink, keys)  # [B, S, D]
    terms = position_terms(cfg, positions, x.dtype)
    x = blocks(cfg, params["blocks"], x, allowed, terms, keys, remat, core)  # [B, S, D]
    return head(cfg, params, x)  # [B, S, V]
