import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.figures import diagnostics
from glm_jax.figures.diagnostics import SCHEMES, tiny
from glm_jax.model import apply, init
from glm_jax.model.positions import position_terms
from glm_jax.model.residual import depth_coefficients
from glm_jax.model.transformer import block, embed

LAYERS = 3

plain_block = jax.jit(block, static_argnums=0)
probed_block = jax.jit(diagnostics.probed_block, static_argnums=0)


@functools.cache
def started(norm):
    cfg = tiny(norm, LAYERS)
    params, rows = diagnostics.start(cfg, jnp.int32(5))
    return cfg, params, rows


@functools.cache
def measured(norm):
    return diagnostics.measure(tiny(norm, LAYERS), [5, 6])


@functools.cache
def gradients(norm):
    cfg, params, rows = started(norm)
    return jax.jit(jax.grad(functools.partial(diagnostics.loss, cfg)))(params, rows)


@pytest.mark.slow
@pytest.mark.oldest
@pytest.mark.parametrize("norm", SCHEMES)
def test_a_probed_block_is_the_models_block(norm):
    cfg, params, rows = started(norm)
    x = embed(cfg, params, rows.tokens, rows.positions)
    terms = position_terms(cfg, rows.positions, x.dtype)
    weights = jax.tree.map(lambda array: array[1], params["blocks"])
    probed, measures = probed_block(cfg, weights, x, rows.allowed, terms, jnp.int32(1))
    expected, _ = plain_block(cfg, weights, x, rows.allowed, terms, jnp.int32(1))
    np.testing.assert_allclose(probed, expected, rtol=1e-5, atol=1e-6)
    assert {name: values.shape for name, values in measures.items()} == dict.fromkeys(
        ("stream", "sublayer", "branch", "residual"), (2,)
    )


@pytest.mark.slow
@pytest.mark.parametrize("norm", SCHEMES)
def test_forward_measures_start_at_the_embedding_and_end_before_the_head(norm):
    cfg, params, rows = started(norm)
    scales = measured(norm)
    x = embed(cfg, params, rows.tokens, rows.positions)
    np.testing.assert_allclose(scales.stream[0, 0], np.sqrt(np.mean(np.square(x))), rtol=1e-6)
    for layer in range(LAYERS):
        weights = jax.tree.map(lambda array, layer=layer: array[layer], params["blocks"])
        terms = position_terms(cfg, rows.positions, x.dtype)
        x, _ = plain_block(cfg, weights, x, rows.allowed, terms, jnp.int32(layer))
        np.testing.assert_allclose(scales.stream[0, 2 * layer + 2], np.sqrt(np.mean(np.square(x))), rtol=1e-5)


@pytest.mark.slow
def test_the_residual_and_the_branch_are_those_of_the_scheme():
    alpha = depth_coefficients("deepnorm", LAYERS).alpha
    np.testing.assert_allclose(measured("deepnorm").residual, alpha, rtol=1e-2)  # alpha times a normed stream
    np.testing.assert_allclose(measured("post").residual, 1, rtol=1e-2)
    np.testing.assert_allclose(measured("sandwich").branch, 1, rtol=1e-2)  # after its norm
    assert (measured("sandwich").sublayer < 0.9).all()
    for norm in ("post", "pre", "deepnorm"):
        np.testing.assert_array_equal(measured(norm).branch, measured(norm).sublayer)
    np.testing.assert_allclose(measured("pre").residual, measured("pre").stream[:, :-1], rtol=1e-4)


@pytest.mark.slow
@pytest.mark.oldest
def test_everything_is_float32_and_has_a_seed_axis():
    cfg = tiny("pre", LAYERS)
    scales = measured("pre")
    shapes = [leaf.shape for leaf in (scales.stream, scales.sublayer, scales.branch, scales.residual)]
    assert shapes == [(2, 2 * LAYERS + 1), (2, 2 * LAYERS), (2, 2 * LAYERS), (2, 2 * LAYERS)]
    assert {kind: values.shape for kind, values in scales.gradient.items()} == {
        "kernels": (2, LAYERS),
        "norms": (2, LAYERS),
    }
    assert {leaf.dtype for leaf in jax.tree.leaves(scales)} == {np.dtype(np.float32)}
    again = diagnostics.measure(cfg, [6])
    np.testing.assert_array_equal(again.stream[0], scales.stream[1])
    assert (scales.stream[0] != scales.stream[1]).all()


@pytest.mark.slow
@pytest.mark.oldest
def test_gradients_are_those_of_the_whole_model():
    cfg, params, rows = started("post")

    def plain(params):
        logits = apply(cfg, params, rows.tokens, rows.positions, rows.allowed)
        rates = jnp.take_along_axis(jax.nn.log_softmax(logits), rows.targets[..., None], axis=-1)[..., 0]
        return -jnp.sum(rates * rows.loss_mask) / jnp.sum(rows.loss_mask)

    blocks = jax.jit(jax.grad(plain))(params)["blocks"]
    squares = {kind: np.zeros(LAYERS) for kind in ("kernels", "norms")}
    for path, array in jax.tree_util.tree_leaves_with_path(blocks):
        kind = "kernels" if path[-1].key == "kernel" else "norms"
        squares[kind] = squares[kind] + np.square(np.asarray(array, np.float64)).reshape(LAYERS, -1).sum(1)
    for kind, square in squares.items():
        np.testing.assert_allclose(measured("post").gradient[kind][0], np.sqrt(square), rtol=1e-4)


def test_half_of_each_row_is_target_and_half_is_seen_by_all():
    rows = diagnostics.random_rows(tiny("pre", 1), jax.random.key(0))
    half = diagnostics.LENGTH // 2
    np.testing.assert_array_equal(rows.loss_mask.sum(1), half)
    allowed = rows.allowed.dense()
    assert allowed[:, :, :half].all() and not allowed[:, :half, half:].any()
    np.testing.assert_array_equal(rows.tokens[:, 1:], rows.targets[:, :-1])


def test_norms_of_layers_do_not_overflow():
    stacked = {"a": jnp.array([[3e30, 0.0], [0.0, 0.0]]), "b": jnp.array([[[4e30]], [[2.0]]])}
    np.testing.assert_allclose(diagnostics.layer_norms(stacked), [5e30, 2], rtol=1e-6)


def test_only_one_kind_of_params_stays():
    tree = {"x": {"kernel": jnp.ones(2), "bias": jnp.ones(3)}, "y": {"scale": jnp.ones(4)}}
    kept = {kind: diagnostics.only(kind, tree) for kind in diagnostics.KINDS}
    sums = {kind: [float(leaf.sum()) for leaf in jax.tree.leaves(each)] for kind, each in kept.items()}
    assert sums == {"kernels": [0, 2, 0], "norms": [3, 0, 4]}  # x/bias, x/kernel, y/scale


@pytest.mark.slow
def test_the_update_is_that_of_one_step_along_the_sign_of_the_gradient():
    cfg, params, rows = started("pre")
    for kind, names in diagnostics.KINDS.items():
        moved = jax.tree_util.tree_map_with_path(
            lambda path, param, slope, names=names: (
                param - 1e-5 * jnp.sign(slope) * (path[-1].key in names and path[0].key == "blocks")
            ),
            params,
            gradients("pre"),
        )
        change = diagnostics.output(cfg, moved, rows) - diagnostics.output(cfg, params, rows)
        expected = float(jnp.sqrt(jnp.mean(change**2)))
        assert expected > 1e-5
        np.testing.assert_allclose(measured("pre").update[kind][0], expected, rtol=0.05)


@pytest.mark.slow
@pytest.mark.oldest
def test_the_output_is_what_the_head_projects():
    cfg, params, rows = started("sandwich")
    hidden = diagnostics.output(cfg, params, rows)
    logits = apply(cfg, params, rows.tokens, rows.positions, rows.allowed)
    np.testing.assert_allclose(hidden @ params["embedding"]["word"].T, logits, atol=1e-5)
    np.testing.assert_allclose(diagnostics.rms(hidden), 1, rtol=1e-3)


@pytest.mark.slow
def test_deepnorm_bounds_the_update_of_kernels_with_depth_and_pre_does_not():
    deeper = {norm: diagnostics.measure(tiny(norm, 4 * LAYERS), [5, 6]) for norm in ("pre", "deepnorm")}
    growth = {norm: np.median(deeper[norm].update["kernels"] / measured(norm).update["kernels"]) for norm in deeper}
    assert growth["deepnorm"] < 1.2 and growth["pre"] > 2


def test_the_activation_is_the_one_asked_for():
    plain = jax.eval_shape(lambda: init(tiny("post", 1, "gelu"), jax.random.key(0)))
    assert plain["blocks"]["feedforward"]["up"]["kernel"].shape == (1, 64, 1, 128)


def test_an_exponent_is_read_off_a_power_law():
    assert diagnostics.exponent([4, 30, 1000], [3 * depth**0.5 for depth in (4, 30, 1000)]) == pytest.approx(0.5)
