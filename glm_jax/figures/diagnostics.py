"""Layer norms at initialisation: how large activations, gradients and the first update are, against depth.

Everything here measures a model before training, so that a thousand layers take seconds. Three scales are measured for
each scheme of model/residual.py, all in float32:

- forward: the residual stream that each layer norm reads, and the branch that is added to it;
- backward: the norm of the loss's gradient with respect to each block's params;
- the model update of DeepNet (arXiv 2203.00555, section 4): how far one step moves the model's output. DeepNet reasons
  with SGD; GLM-130B used the exponents for Adam, so the step here is Adam's.

DeepNet's small models are 64-128-2 (hidden size, feed-forward size, heads), and so is `tiny`, with GLM's GeGLU, rotary
positions and masks.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, NamedTuple, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
import optax

from glm_jax.config.model import Activation, Norm
from glm_jax.model import GLMConfig, Visibility, init
from glm_jax.model.attention import Attention
from glm_jax.model.feedforward import FeedForward
from glm_jax.model.layers import LayerNorm, run
from glm_jax.model.positions import PositionTerms, position_terms
from glm_jax.model.residual import residual_update
from glm_jax.model.transformer import blocks, embed, head
from glm_jax.types import Tree

Array = jax.Array
A = TypeVar("A", np.ndarray, Array)  # of measures: jax.Array of one seed, np.ndarray of several
Params = dict[str, Tree]
Sublayer = Callable[[Array], Array]

SCHEMES: tuple[Norm, ...] = ("post", "pre", "sandwich", "deepnorm")
RATE = 1e-5  # of the one Adam step: small, so that updates are in proportion to it
KINDS: Mapping[str, tuple[str, ...]] = {"kernels": ("kernel",), "norms": ("scale", "bias")}  # the names of their arrays
ROWS, LENGTH = 4, 32  # of the batch on which everything is measured


class RandomRows(NamedTuple):
    """A batch of random tokens: the first half of each row is context, the second half the target."""

    tokens: Array  # int32 [B, S]
    targets: Array  # int32 [B, S]
    positions: Array  # int32 [B, S]
    allowed: Visibility
    loss_mask: Array  # float32 [B, S]


class Scales(NamedTuple, Generic[A]):
    """Root mean squares along the depth, norms of gradients, and updates: of one seed, or with a leading axis of seeds.

    There are 2L sublayers: attention, feed-forward, attention, ... Params come in two kinds, see `KINDS`.
    """

    stream: A  # float32 [2L + 1]: what each layer norm reads, the final one last
    sublayer: A  # float32 [2L]: the output of each sublayer
    branch: A  # float32 [2L]: what is added to the residual: the sublayer's output, after sandwich's second norm
    residual: A  # float32 [2L]: what it is added to; alpha times the normed stream under deepnorm
    gradient: dict[str, A]  # by kind, float32 [L]: norm of the gradient of each block's params
    update: dict[str, A]  # by kind, float32 []: see `model_update`


def tiny(norm: Norm, layers: int, activation: Activation = "geglu") -> GLMConfig:
    """Return a GLM of 64-128-2 and `layers` layers."""
    return GLMConfig(
        layers, hidden_size=64, num_heads=2, ffn_size=128, vocab_size=256, norm=norm, activation=activation
    )


def random_rows(cfg: GLMConfig, key: Array) -> RandomRows:
    """Draw ROWS rows of LENGTH tokens, uniform over the vocabulary."""
    drawn = jax.random.randint(key, (ROWS, LENGTH + 1), 0, cfg.vocab_size)  # [B, S + 1]
    positions = jnp.broadcast_to(jnp.arange(LENGTH), (ROWS, LENGTH))  # [B, S]
    context = positions < LENGTH // 2  # [B, S]
    allowed = Visibility(jnp.ones_like(positions), context)
    return RandomRows(drawn[:, :-1], drawn[:, 1:], positions, allowed, (~context).astype(jnp.float32))


def rms(x: Array) -> Array:
    """Return the root mean square of all entries."""
    return jnp.sqrt(jnp.mean(x * x))


class _Probed(NamedTuple):
    """The parts around one sublayer of a block with `weights`, and the outputs of some of them in `seen`."""

    cfg: GLMConfig
    weights: Params
    sublayer: str
    seen: dict[str, Array]

    def norm(self, name: str) -> Sublayer:
        weights = self.weights[f"{self.sublayer}_{name}"]
        return self.kept(name, lambda z: run(LayerNorm(self.cfg.norm_epsilon), weights, z))  # [B, S, D]

    def scale(self, initial: float) -> Array:
        return self.weights[f"{self.sublayer}_scale"]

    def kept(self, name: str, function: Sublayer) -> Sublayer:
        def call(z: Array) -> Array:
            self.seen[name] = function(z)
            return self.seen[name]

        return call


def _probed_sublayer(
    cfg: GLMConfig, weights: Params, name: str, x: Array, sublayer: Sublayer
) -> tuple[Array, dict[str, Array]]:
    """Apply one sublayer as `residual_update` does, and measure what passes through it."""
    parts = _Probed(cfg, weights, name, {})
    updated = residual_update(x, parts.kept("sublayer", sublayer), parts)
    seen = parts.seen
    branch = seen.get("output_norm", seen["sublayer"])  # only sandwich has the second norm
    measures = {"stream": x, "sublayer": seen["sublayer"], "branch": branch, "residual": updated - branch}
    return updated, jax.tree.map(rms, measures)


def probed_block(
    cfg: GLMConfig, weights: Params, x: Array, allowed: Array | Visibility, terms: PositionTerms, layer: Array
) -> tuple[Array, dict[str, Array]]:
    """Run one block, x [B, S, D] -> [B, S, D], as model.transformer does (without dropout), and measure inside.

    Returns:
        x, and the forward measures of `Scales`, float32 [2] each: for attention and feed-forward.
    """

    def attend(z: Array) -> Array:
        return run(Attention(cfg), weights["attention"], z, allowed, terms, layer, None, None)[0]  # [B, S, D]

    def feed(z: Array) -> Array:
        return run(FeedForward(cfg), weights["feedforward"], z)  # [B, S, D]

    x, first = _probed_sublayer(cfg, weights, "attention", x, attend)
    x, second = _probed_sublayer(cfg, weights, "feedforward", x, feed)
    return x, jax.tree.map(lambda *pair: jnp.stack(pair), first, second)


def forward_scales(cfg: GLMConfig, params: Params, rows: RandomRows) -> dict[str, Array]:
    """Run the model forward in one scan over the layers, and return the forward measures of `Scales`."""
    x = embed(cfg, params, rows.tokens, rows.positions)  # [B, S, D]
    terms = position_terms(cfg, rows.positions, x.dtype)

    def one(x: Array, scanned: tuple[Params, Array]) -> tuple[Array, dict[str, Array]]:
        return probed_block(cfg, scanned[0], x, rows.allowed, terms, scanned[1])

    x, measures = jax.lax.scan(one, x, (params["blocks"], jnp.arange(cfg.num_layers)))
    measures = {name: values.reshape(-1) for name, values in measures.items()}  # [2L]
    return measures | {"stream": jnp.append(measures["stream"], rms(x))}


def _stream(cfg: GLMConfig, params: Params, rows: RandomRows) -> Array:
    """Return the residual stream after the last block [B, S, D]; gradients recompute the inside of blocks."""
    x = embed(cfg, params, rows.tokens, rows.positions)  # [B, S, D]
    return blocks(cfg, params["blocks"], x, rows.allowed, position_terms(cfg, rows.positions, x.dtype), remat=True)


def loss(cfg: GLMConfig, params: Params, rows: RandomRows) -> Array:
    """Return the mean cross-entropy of the target tokens, in nats."""
    logits = head(cfg, params, _stream(cfg, params, rows))  # [B, S, V]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, rows.targets)  # [B, S]
    return jnp.sum(losses * rows.loss_mask) / jnp.sum(rows.loss_mask)


def only(kind: str, tree: Params) -> Params:
    """Return the arrays of one of `KINDS`, with zeros in place of all others. Biases count with the layer norms."""
    names = KINDS[kind]
    return jax.tree_util.tree_map_with_path(
        lambda path, array: array if path[-1].key in names else jnp.zeros_like(array), tree
    )


def layer_norms(stacked: Params) -> Array:
    """Return each layer's norm over all arrays [L, ...]: float32 [L]. The squares do not overflow."""
    flat = [array.reshape(array.shape[0], -1) for array in jax.tree.leaves(stacked)]  # [L, n] each
    largest = jnp.stack([jnp.max(jnp.abs(array), axis=1) for array in flat]).max(axis=0)  # [L]
    unit = jnp.maximum(largest, jnp.finfo(jnp.float32).tiny)[:, None]  # [L, 1]
    squares = sum(jnp.sum((array / unit) ** 2, axis=1) for array in flat)  # [L]
    return largest * jnp.sqrt(squares)


@functools.partial(jax.jit, static_argnums=0)
def output(cfg: GLMConfig, params: Params, rows: RandomRows) -> Array:
    """Return the input of the head, the final norm's output [B, S, D]; its rms is 1."""
    return run(LayerNorm(cfg.norm_epsilon), params["final_norm"], _stream(cfg, params, rows))  # [B, S, D]


def model_update(cfg: GLMConfig, params: Params, rows: RandomRows, gradients: Params, kind: str) -> Array:
    """Return the rms change of the output, whose rms is 1, after one Adam step at RATE on one kind of block params.

    Two unrelated outputs differ by the square root of 2. The embedding and the final norm do not change, so this is
    the change of the stack of blocks (F in section 4 of DeepNet). No warm-up, no clipping, no weight decay.
    """
    adam = optax.adam(RATE, b1=0.9, b2=0.95)  # its first step is close to the sign of the gradient
    step: Tree = adam.update(gradients["blocks"], adam.init(gradients["blocks"]))[0]
    updated = optax.apply_updates(params["blocks"], only(kind, step))
    return rms(output(cfg, params | {"blocks": updated}, rows) - output(cfg, params, rows))


@functools.partial(jax.jit, static_argnums=0)
def start(cfg: GLMConfig, seed: Array) -> tuple[Params, RandomRows]:
    """Initialise a model and draw its rows from a seed, int32 []."""
    params_key, rows_key = jax.random.split(jax.random.key(seed))
    return init(cfg, params_key), random_rows(cfg, rows_key)


@functools.partial(jax.jit, static_argnums=0)
def _look(cfg: GLMConfig, params: Params, rows: RandomRows) -> tuple[dict[str, Array], Params]:
    return forward_scales(cfg, params, rows), jax.grad(functools.partial(loss, cfg))(params, rows)


def measure_one(cfg: GLMConfig, seed: int) -> Scales[Array]:
    """Initialise a model from a seed, and measure it on rows drawn from the same seed."""
    params, rows = start(cfg, jnp.int32(seed))
    scales, gradients = _look(cfg, params, rows)
    return Scales(
        **scales,
        gradient={kind: layer_norms(only(kind, gradients["blocks"])) for kind in KINDS},
        update={kind: model_update(cfg, params, rows, gradients, kind) for kind in KINDS},
    )


def measure(cfg: GLMConfig, seeds: Sequence[int]) -> Scales[np.ndarray]:
    """Measure a model at several seeds, which share compiled programs: numpy arrays with a leading axis of seeds."""
    measured = [measure_one(cfg, seed) for seed in seeds]
    return jax.tree.map(lambda *values: np.stack([np.asarray(value) for value in values]), *measured)


def exponent(depths: Sequence[int], values: Sequence[float]) -> float:
    """Return p of the power law depth ** p that best fits positive values, by least squares on logarithms."""
    return float(np.polyfit(np.log(depths), np.log(values), 1)[0])
