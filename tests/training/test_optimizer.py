"""Decay, clipping and AdamW's update, against numbers worked out by hand and numpy_adamw.py."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax.training import optimizer
from glm_jax.training.optimizer import OptimizerConfig
from tests.training import numpy_adamw


def test_norms_and_biases_do_not_decay_and_the_embedding_does() -> None:
    params = {"embedding": {"word": 0}, "norm": {"scale": 0, "bias": 0}, "up": {"kernel": 0, "bias": 0}}
    assert optimizer.decays(params) == {
        "embedding": {"word": True},
        "norm": {"scale": False, "bias": False},
        "up": {"kernel": True, "bias": False},
    }


def test_defaults_are_those_of_glm_130b() -> None:
    """Paper, table 11."""
    assert dataclasses.astuple(OptimizerConfig()) == (0.9, 0.95, 1e-8, 0.1, 1.0)


def test_first_update_is_adamws_with_clipped_gradients() -> None:
    cfg = OptimizerConfig(clip_norm=1.0, weight_decay=0.1, epsilon=1e-2)
    params = {"up": {"kernel": jnp.array([1.0, -2.0]), "bias": jnp.array([0.5])}}
    gradients = {"up": {"kernel": jnp.array([3.0, 0.0]), "bias": jnp.array([4.0])}}
    moments = optimizer.transformation(cfg).init(params)
    new, _, norms, _ = optimizer.update(cfg, gradients, moments, params, jnp.float32(0.1))
    assert norms["grad_norm"] == pytest.approx(5.0) and norms["param_norm"] == pytest.approx(5.25**0.5)
    moved = [a - b for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(new), strict=True)]
    assert norms["update_norm"] == pytest.approx(float(jnp.linalg.norm(jnp.concatenate(moved))))
    # clipped to (0.6, 0, 0.8); the first Adam direction is g / (|g| + epsilon)
    np.testing.assert_allclose(new["up"]["kernel"], [1 - 0.1 * (0.6 / 0.61 + 0.1), -2 + 0.1 * 0.2], rtol=1e-5)
    np.testing.assert_allclose(new["up"]["bias"], [0.5 - 0.1 * 0.8 / 0.81], rtol=1e-5)


@pytest.mark.parametrize("constants", [{}, {"beta1": 0.7, "beta2": 0.4, "epsilon": 0.3, "weight_decay": 0.5}])
def test_six_updates_and_their_moments_are_those_of_the_paper(constants: dict[str, float]) -> None:
    """Gradients and learning rates change from step to step; some gradients are clipped and some are not."""
    cfg, draw = OptimizerConfig(clip_norm=2.0, **constants), np.random.default_rng(0)
    shapes = {
        "embedding": {"word": (5, 3)},
        "norm": {"scale": (3,), "bias": (3,)},
        "up": {"kernel": (2, 4), "bias": (4,)},
    }
    is_shape = lambda leaf: isinstance(leaf, tuple)  # noqa: E731
    params = jax.tree.map(lambda shape: np.float32(draw.normal(size=shape)), shapes, is_leaf=is_shape)
    moments, expected = optimizer.transformation(cfg).init(params), numpy_adamw.flat(params)
    of_expected = numpy_adamw.start(expected)
    glm_130b = {
        "beta1": 0.9,
        "beta2": 0.95,
        "epsilon": 1e-8,
        "weight_decay": 0.1,
    }  # paper table 11, except clipping
    for step, (norm, lr) in enumerate([(6.0, 0.1), (0.9, 0.2), (2.5, 0.05), (1.9, 0.1), (9.0, 0.3), (0.2, 0.1)]):
        gradients = jax.tree.map(lambda shape: np.float32(draw.normal(size=shape)), shapes, is_leaf=is_shape)
        size = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
        gradients = jax.tree.map(lambda leaf, scale=norm / size: leaf * scale, gradients)
        expected, of_expected = numpy_adamw.update(
            expected, numpy_adamw.flat(gradients), of_expected, lr, clip_norm=2.0, **(glm_130b | constants)
        )
        params, moments, norms, _ = optimizer.update(cfg, gradients, moments, params, jnp.float32(lr))
        assert norms["grad_norm"] == pytest.approx(norm, rel=1e-6)
        for ours, theirs in (
            (params, expected),
            (moments[0].mu, of_expected.first),
            (moments[0].nu, of_expected.second),
        ):
            for name, array in numpy_adamw.flat(ours).items():
                np.testing.assert_allclose(array, theirs[name], rtol=1e-4, atol=2e-6, err_msg=f"{name}, step {step}")
        assert moments[0].count == step + 1 == of_expected.steps


def test_small_gradients_are_not_clipped() -> None:
    cfg = OptimizerConfig(clip_norm=10.0, weight_decay=0.0, epsilon=1.0)
    params = {"bias": jnp.array([0.0])}
    new, _, _, _ = optimizer.update(
        cfg, {"bias": jnp.array([3.0])}, optimizer.transformation(cfg).init(params), params, jnp.float32(1.0)
    )
    np.testing.assert_allclose(new["bias"], [-3 / 4], rtol=1e-5)
    assert jax.tree.structure(new) == jax.tree.structure(params)


def test_the_clipping_factor_is_that_of_torch() -> None:
    """The 1e-6 added to the norm shows when both are small: 3e-6 / (5e-6 + 1e-6) is a half."""
    cfg, params = OptimizerConfig(clip_norm=3e-6), {"kernel": jnp.zeros(2)}
    moments = optimizer.transformation(cfg).init(params)
    gradients = {"kernel": jnp.array([3e-6, -4e-6])}
    _, moments, _, _ = optimizer.update(cfg, gradients, moments, params, jnp.float32(0.1))
    np.testing.assert_allclose(moments[0].mu["kernel"], [0.15e-6, -0.2e-6], rtol=1e-5)


def test_group_norms_split_the_global_norm_and_leave_padding_out() -> None:
    draw = np.random.default_rng(0)
    gradients = {
        "embedding": {"word": jnp.asarray(draw.normal(size=(5, 3)))},
        "blocks": {"kernel": jnp.asarray(draw.normal(size=(7, 2, 3))), "bias": jnp.asarray(draw.normal(size=(7, 3)))},
        "final_norm": {"scale": jnp.asarray(draw.normal(size=3))},
    }
    gradients["blocks"] = jax.tree.map(lambda leaf: leaf.at[6].set(0), gradients["blocks"])  # 6 layers, then padding
    norms = optimizer.group_norms(gradients, 6)
    assert sorted(norms) == ["grad_norm/blocks_0_0", "grad_norm/blocks_1_2", "grad_norm/blocks_3_3",
                             "grad_norm/blocks_4_5", "grad_norm/embedding", "grad_norm/final_norm"]  # fmt: skip
    two = [leaf[1:3].ravel() for leaf in gradients["blocks"].values()]
    assert norms["grad_norm/blocks_1_2"] == pytest.approx(float(jnp.linalg.norm(jnp.concatenate(two))))
    whole = sum(float(norm) ** 2 for norm in norms.values()) ** 0.5
    assert whole == pytest.approx(float(optimizer.optax.tree.norm(gradients)))


@pytest.mark.parametrize(
    "cfg, gradient, taken",
    [
        (OptimizerConfig(), 1.0, True),
        (OptimizerConfig(), float("nan"), False),
        (OptimizerConfig(), float("inf"), False),
        (optax.adam(1e-3), float("nan"), False),
        (optax.adam(1e30), 1.0, False),  # the squares of its updates overflow
    ],
)
def test_a_step_that_is_not_finite_changes_no_bit(cfg: optimizer.Optimizer, gradient: float, taken: bool) -> None:
    before = {"up": {"kernel": jnp.array([1.0, -2.0, 0.0]), "bias": jnp.array([0.5])}}
    gradients = jax.tree.map(lambda leaf: 0.1 * leaf + 0.01, before)
    usual = optax.adam(1e-3) if isinstance(cfg, optax.GradientTransformation) else cfg
    moments = optimizer.transformation(usual).init(before)
    before, moments, *_ = optimizer.update(usual, gradients, moments, before, jnp.float32(0.1))
    gradients["up"]["kernel"] = gradients["up"]["kernel"].at[1].set(gradient)
    params, after, norms, finite = optimizer.update(cfg, gradients, moments, before, jnp.float32(0.1))
    pairs = zip(jax.tree.leaves((params, after)), jax.tree.leaves((before, moments)), strict=True)
    same = [bool((new == old).all()) for new, old in pairs]
    assert not any(same) if taken else all(same)
    assert bool(finite) == taken and np.isfinite(norms["param_norm"])
