"""The model's contracts: shapes, counts, initialisation, cache, dropout, and options that must not change numbers."""

import dataclasses
import math
from typing import Any, get_args

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.config.model import Activation, Model, Norm
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig, Visibility, apply, init, logical_axes, transformer
from glm_jax.model.positions import alibi_distance, alibi_slopes
from glm_jax.training.optimizer import decays

SMALL = GLMConfig(3, 32, 4, 48, 64, max_length=32, attention_dropout=0.1, hidden_dropout=0.1)


def sample(cfg: GLMConfig, length: int = 12, context: int = 7) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Return tokens, positions and allowed of two rows with `context` bidirectional tokens and a blank at 3."""
    tokens = jax.random.randint(jax.random.key(1), (2, length), 0, cfg.vocab_size)
    places = np.arange(length)
    positions = np.where(places < context, places, 3)
    if cfg.position == "learned_2d":
        positions = np.stack([positions, np.where(places < context, 0, places - context + 1)])
    positions = jnp.asarray(np.stack([positions, positions]), jnp.int32)
    segments = jnp.ones((2, length), jnp.int32)
    return tokens, positions, Visibility(segments, jnp.broadcast_to(places < context, (2, length))).dense()


@pytest.mark.parametrize("norm", get_args(Norm))
@pytest.mark.parametrize("position, activation", [("rope", "geglu"), ("learned_2d", "gelu"), ("alibi", "gelu_tanh")])
def test_parameter_count_and_axes_follow_the_params(norm: str, position: str, activation: str) -> None:
    cfg = dataclasses.replace(SMALL, norm=norm, position=position, activation=activation, embedding_norm=True,
                              qk_norm=position == "rope")  # fmt: skip
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    assert sum(leaf.size for leaf in jax.tree.leaves(params)) == cfg.num_parameters
    axes = logical_axes(cfg)
    ranks = jax.tree.map(len, axes, is_leaf=lambda leaf: isinstance(leaf, tuple))
    assert ranks == jax.tree.map(lambda leaf: leaf.ndim, params)
    assert axes["blocks"]["attention"]["qkv"]["kernel"] == ("layers", "hidden", "heads", None, None)


def test_glm_130b_has_its_published_parameter_count() -> None:
    cfg = GLMConfig(num_layers=70, hidden_size=12288, num_heads=96, ffn_size=32768, vocab_size=150528)
    assert cfg.num_parameters == 128_697_794_560


def matmul_flops(jaxpr: Any) -> int:
    """Count 2 for each multiply-add in the matmuls of a traced program; count a scan's body as often as it runs."""
    total = 0
    for equation in jaxpr.eqns:
        if equation.primitive.name == "dot_general":
            (contracted, _), _ = equation.params["dimension_numbers"]
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            total += 2 * depth * equation.outvars[0].aval.size
        for value in equation.params.values():
            inner = getattr(value, "jaxpr", value)
            if hasattr(inner, "eqns"):
                total += matmul_flops(inner) * equation.params.get("length", 1)
    return total


@pytest.mark.parametrize("activation, by_hand", [("geglu", 295_680), ("gelu", 255_360)])
def test_forward_flops_count_every_matmul(activation: Activation, by_hand: int) -> None:
    """By hand, a token: qkv 2400, scores 480, mixing 480, output 800, up 2240 (gelu: 1120), down 1120, head 2080."""
    cfg = GLMConfig(3, 20, 5, 28, 52, activation=activation)
    assert cfg.forward_flops(12) == by_hand == 12 * (3 * (6400 + 1120 * (activation == "geglu")) + 2080)
    params = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    traced = jax.make_jaxpr(lambda params: apply(cfg, params, *sample(cfg)))(params)
    assert matmul_flops(traced.jaxpr) == 2 * by_hand  # of two rows


@pytest.mark.parametrize(
    "norm, value, output", [("deepnorm", 200**-0.5, 200**-0.5), ("post", 1, 1), ("pre", 1, 200**-0.5)]
)
def test_initial_scales_follow_the_depth_coefficients(norm: Norm, value: float, output: float) -> None:
    cfg = GLMConfig(100, 64, 4, 96, 128, norm=norm)
    blocks = init(cfg, jax.random.key(0))["blocks"]
    qkv = blocks["attention"]["qkv"]["kernel"]  # [L, D, N, 3, K]
    xavier = (2 / 128) ** 0.5
    for part, gain in ((0, 1.0), (1, 1.0), (2, value)):
        assert qkv[:, :, :, part].std() == pytest.approx(xavier * gain, rel=0.02)
    assert blocks["attention"]["output"]["kernel"].std() == pytest.approx(xavier * output, rel=0.02)
    assert blocks["feedforward"]["up"]["kernel"].std() == pytest.approx((2 / 160) ** 0.5 * value, rel=0.02)
    assert blocks["feedforward"]["down"]["kernel"].std() == pytest.approx((2 / 160) ** 0.5 * output, rel=0.02)
    assert not blocks["attention"]["qkv"]["bias"].any() and (blocks["attention_norm"]["scale"] == 1).all()


@pytest.mark.slow
def test_largescale_initialisation_gives_whole_heads_the_gain() -> None:
    cfg = GLMConfig(8, 96, 12, 96, 128, initialisation="largescale")  # 4 ranks of 3 heads
    kernel = init(cfg, jax.random.key(0))["blocks"]["attention"]["qkv"]["kernel"]  # [L, D, N, 3, K]
    scales = kernel.std(axis=(0, 1, 3, 4)) / (2 / 192) ** 0.5  # [N]
    np.testing.assert_allclose(scales, [1, 1, 0.25] * 4, rtol=0.1)


def test_visibility_is_the_rule_of_packed_segments() -> None:
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 0]])
    context = np.array([[1, 1, 0, 0, 1, 0, 0, 0]], bool)
    allowed = np.asarray(Visibility(jnp.asarray(segments), jnp.asarray(context)).dense())
    for query in range(8):
        for key in range(8):
            same = segments[0, query] == segments[0, key]
            assert allowed[0, query, key] == (same and (key <= query or context[0, key]))


def test_visibility_may_be_a_structure_or_dense() -> None:
    params = init(SMALL, jax.random.key(0))
    tokens, positions, allowed = sample(SMALL)
    lines = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)  # [B, S]
    seen = Visibility(jnp.where(lines < 9, 1, 2), (lines < 4) | ((lines > 8) & (lines < 11)))
    np.testing.assert_array_equal(
        apply(SMALL, params, tokens, positions, seen), apply(SMALL, params, tokens, positions, seen.dense())
    )
    assert (apply(SMALL, params, tokens, positions, seen) != apply(SMALL, params, tokens, positions, allowed)).any()


def test_a_scheme_may_have_a_learnt_scalar_in_every_sublayer(monkeypatch: pytest.MonkeyPatch) -> None:
    def rezero(x: jax.Array, sublayer: Any, parts: Any) -> jax.Array:
        return x + parts.scale(0.5) * sublayer(x)

    monkeypatch.setattr(transformer, "residual_update", rezero)
    params = init(SMALL, jax.random.key(0))
    scales = [params["blocks"][f"{name}_scale"] for name in ("attention", "feedforward")]
    assert [scale.tolist() for scale in scales] == [[0.5] * SMALL.num_layers] * 2
    assert logical_axes(SMALL)["blocks"]["attention_scale"] == ("layers",)
    assert "attention_norm" not in params["blocks"] and not decays(params)["blocks"]["attention_scale"]
    gradients = jax.grad(lambda params: apply(SMALL, params, *sample(SMALL)).std())(params)
    assert (gradients["blocks"]["attention_scale"] != 0).all()


def test_options_for_float16_scores_leave_the_logits_alone() -> None:
    params = init(SMALL, jax.random.key(0))
    plain = apply(dataclasses.replace(SMALL, score_scaling=False), params, *sample(SMALL))
    for cfg in (SMALL, dataclasses.replace(SMALL, pb_relax=128.0)):
        np.testing.assert_allclose(apply(cfg, params, *sample(SMALL)), plain, atol=1e-5)


@pytest.mark.parametrize(
    "changes, finite", [({}, True), ({"pb_relax": 128.0}, True), ({"score_scaling": False}, False)]
)
def test_float16_scores_stay_in_range(changes: dict, finite: bool) -> None:
    cfg = dataclasses.replace(SMALL, num_layers=1, norm="pre", **changes)
    params = init(cfg, jax.random.key(0))
    qkv = params["blocks"]["attention"]["qkv"]
    qkv["bias"] = qkv["bias"].at[:, :, :2].set(250.0 if changes else 150.0)  # q.k / sqrt(K) is 176,000, or 63,600
    weights = jax.tree.map(lambda param: param.astype(jnp.float16), params)
    assert bool(jnp.isfinite(apply(cfg, weights, *sample(cfg))).all()) == finite


def test_dropout_needs_a_key_and_repeats_with_it() -> None:
    params = init(SMALL, jax.random.key(0))
    arguments = sample(SMALL)
    plain = apply(SMALL, params, *arguments)
    first, again, other = (apply(SMALL, params, *arguments, key=jax.random.key(seed)) for seed in (1, 1, 2))
    assert (first == again).all() and not jnp.allclose(first, other) and not jnp.allclose(first, plain)


@pytest.mark.slow
def test_remat_gives_the_same_gradients_with_dropout() -> None:
    params, arguments = init(SMALL, jax.random.key(0)), sample(SMALL)

    def loss(params: dict, remat: bool) -> jax.Array:
        return (apply(SMALL, params, *arguments, key=jax.random.key(1), remat=remat) ** 2).mean()

    gradients = [jax.grad(loss)(params, remat) for remat in (False, True)]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), *gradients)
    programs = [str(jax.make_jaxpr(loss, static_argnums=1)(params, remat)) for remat in (False, True)]
    assert ["remat" in program or "checkpoint" in program for program in programs] == [False, True]


@pytest.mark.slow
@pytest.mark.oldest
def test_shrink_scales_the_gradient_of_the_input_path_alone() -> None:
    params, arguments = init(SMALL, jax.random.key(0)), sample(SMALL)

    def word_gradient(shrink: float | None) -> jax.Array:
        def loss(params: dict) -> jax.Array:
            return (apply(SMALL, params, *arguments, shrink=shrink) ** 2).mean()

        return jax.grad(loss)(params)["embedding"]["word"]

    head_path, whole, shrunk = word_gradient(0.0), word_gradient(None), word_gradient(0.1)
    np.testing.assert_allclose(shrunk, head_path + 0.1 * (whole - head_path), atol=1e-6)
    assert not jnp.allclose(whole, head_path, atol=1e-4)


def test_alibi_distance_counts_inside_a_repeated_position() -> None:
    distance = alibi_distance(jnp.array([[0, 1, 2, 1, 1, 1]])).dense()[0]
    np.testing.assert_array_equal(distance[5], [1, 0, 1, 2, 1, 0])


def test_alibi_slopes_of_any_head_count() -> None:
    assert alibi_slopes(4) == [2**-2, 2**-4, 2**-6, 2**-8]
    assert alibi_slopes(6) == [2**-2, 2**-4, 2**-6, 2**-8, 2**-1, 2**-3]


def test_sizes_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ValueError, match="not divisible by num_heads 5"):
        dataclasses.replace(SMALL, num_heads=5)
    with pytest.raises(ValueError, match="rotary positions need it to be even"):
        dataclasses.replace(SMALL, hidden_size=12)


@pytest.mark.parametrize("name", ["num_layers", "hidden_size", "num_heads", "ffn_size", "vocab_size", "max_length"])
def test_sizes_below_one_are_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} is 0, it must be at least 1"):
        dataclasses.replace(SMALL, **{name: 0})
    sizes: dict[str, Any] = {
        "num_layers": 1,
        "hidden_size": 1,
        "num_heads": 1,
        "ffn_size": 1,
        "vocab_size": 1,
        "max_length": 1,
    }
    assert getattr(GLMConfig(**sizes, position="alibi"), name) == 1


def test_a_section_leaves_vocabulary_and_length_to_the_data() -> None:
    section = Model(1, 8, 2, 8, vocab_multiple=64, norm="pre")
    read = section.glm(pieces=129, seq_length=40)
    assert (read.vocab_size, read.max_length, read.norm) == (192, 40, "pre")
    assert section.glm(128, 40).vocab_size == 128
    given = dataclasses.replace(section, vocab_size=130, max_length=50)
    read = given.glm(pieces=129, seq_length=40)
    assert (read.vocab_size, read.max_length) == (130, 50)
    with pytest.raises(UserError, match="model.vocab_size 130 is less than the tokenizer's 131 pieces"):
        given.glm(131, 40)


def test_defaults_are_those_of_glm_130b() -> None:
    """Paper, sections 2.1 to 3.2 and table 11."""
    cfg = GLMConfig(1, 8, 2, 8, 8)
    assert (cfg.norm, cfg.position, cfg.activation, cfg.max_length) == ("deepnorm", "rope", "geglu", 2048)
    assert (cfg.attention_dropout, cfg.hidden_dropout, cfg.norm_epsilon, cfg.rope_base) == (0.0, 0.0, 1e-5, 10000.0)
    assert (cfg.embedding_norm, cfg.score_scaling, cfg.pb_relax, cfg.rope_angles) == (False, True, 0.0, "float32")
