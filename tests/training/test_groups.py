"""Frozen parts, multipliers of the learning rate and adapters: against hand numbers, numpy and plain autodiff."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from glm_jax import model
from glm_jax.config import Experiment, with_changes
from glm_jax.config.training import Lora, OptimizerConfig
from glm_jax.errors import UserError
from glm_jax.model import GLMConfig, groups, parts
from glm_jax.model.groups import Groups
from glm_jax.training import optimizer
from glm_jax.training.optimizer import transformation
from tests.training import numpy_adamw
from tests.training.test_step import CONFIG, LR, MODEL, compiled, make_batch, run

PAPER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}  # GLM-130B's, table 11


def factors(**changes: Any) -> dict[str, list[float]]:
    found = groups.multipliers(Groups(**changes), GLMConfig(3, 8, 2, 12, 16))
    return {"/".join(path): factor.tolist() for path, factor in found.items()}


def test_layers_below_learn_slower_by_a_factor_each() -> None:
    found = factors(layer_decay=0.5)
    assert found["blocks/attention/qkv/kernel"] == found["blocks/feedforward_norm/bias"] == [0.25, 0.5, 1.0]
    assert (found["embedding/word"], found["final_norm/scale"]) == (0.125, 1.0)


def test_multipliers_are_multiplied_and_what_is_frozen_has_0() -> None:
    found = factors(
        frozen=("embedding", "blocks/0..1"), layer_decay=0.5, multipliers=(("blocks", 3.0), ("blocks/1..2", 2.0))
    )
    assert found["blocks/attention/qkv/kernel"] == [0.0, 0.0, 6.0]
    assert (found["embedding/word"], found["final_norm/scale"]) == (0.0, 1.0)


def test_an_unknown_part_is_refused_under_its_key() -> None:
    for key, changes in (
        ("train.freeze", {"frozen": ("x",)}),
        ("optimizer.multipliers", {"multipliers": (("x", 1.0),)}),
    ):
        with pytest.raises(UserError, match=f"{key} names 'x'"):
            factors(**changes)


def test_a_multiplier_of_0_is_refused_as_it_would_change_which_moments_there_are_during_a_run() -> None:
    for changes in ({"optimizer.multipliers": (("embedding", 0.0),)}, {"optimizer.layer_decay": 0.0}):
        with pytest.raises(UserError, match="must be above 0"):
            with_changes(Experiment(), changes)


def test_padded_layers_and_adapters_have_the_multipliers_of_their_params() -> None:
    arrays = {"blocks": {"attention": {"qkv": {"kernel": {"a": np.ones((4, 8, 2))}, "bias": np.ones((4, 24))}}}}
    whole: Any = groups.of_params(Groups(layer_decay=0.5), GLMConfig(3, 8, 2, 12, 16), arrays)
    found = whole["blocks"]["attention"]["qkv"]
    assert found["kernel"]["a"].shape == (4, 1, 1) and found["bias"].shape == (4, 1)
    assert found["kernel"]["a"].ravel().tolist() == found["bias"].ravel().tolist() == [0.25, 0.5, 1.0, 0.0]
    assert groups.of_params(Groups(), GLMConfig(3, 8, 2, 12, 16), arrays) is None


@pytest.mark.slow
def test_updates_of_groups_are_those_of_numpy(mesh_sizes: dict[str, int]) -> None:
    """Frozen arrays keep their bits and count in no norm; the others move by their share of the update."""
    frozen = ("embedding", "blocks/0/feedforward", "blocks/attention/output")
    cfg = dataclasses.replace(CONFIG, groups=Groups(frozen, 0.5, (("final_norm", 0.25),)))
    start = compiled(cfg, mesh_sizes).start
    state, (metrics,) = run(cfg, mesh_sizes, 1, 1)
    gradients = {name: np.array(array) for name, array in numpy_adamw.flat(plain_gradients(start.params)).items()}
    before, after = numpy_adamw.flat(start.params), numpy_adamw.flat(state.params)
    for name, gradient in gradients.items():
        if name.startswith(("embedding", "blocks/attention/output")):
            gradient[...] = 0
        elif name.startswith("blocks/feedforward/"):
            gradient[0] = 0
    expected, _ = numpy_adamw.update(before, gradients, numpy_adamw.start(before), LR, **PAPER)
    assert metrics["grad_norm"] == pytest.approx(np.sqrt(sum((one**2).sum() for one in gradients.values())), rel=1e-5)
    for name, array in after.items():
        moved = expected[name] - before[name]
        share = np.array([0.5, 1.0]).reshape(2, *[1] * (array.ndim - 1)) if name.startswith("blocks") else 0.25
        frozen_layers = slice(None) if name.startswith(("embedding", "blocks/attention/output")) else slice(0, 0)
        frozen_layers = slice(0, 1) if name.startswith("blocks/feedforward/") else frozen_layers
        np.testing.assert_array_equal(array[frozen_layers], before[name][frozen_layers], err_msg=name)
        wanted = before[name] + share * moved
        wanted[frozen_layers] = before[name][frozen_layers]
        np.testing.assert_allclose(array, wanted, atol=2e-4, err_msg=name)
    kept = {parts.path_of(path)[-3:-1] for path, _ in jax.tree_util.tree_leaves_with_path(state.moments)}
    assert ("attention", "qkv") in kept and ("attention", "output") not in kept  # no moments where all is frozen


def test_any_optimizer_of_optax_leaves_frozen_parts_alone() -> None:
    params = {"embedding": {"word": jnp.ones(3)}, "final_norm": {"scale": jnp.ones(2)}}
    multipliers = {"embedding": {"word": np.float32(0)}, "final_norm": {"scale": np.float32(0.5)}}
    sgd = optax.sgd(1.0, momentum=0.9)
    moments = transformation(sgd, multipliers).init(params)
    new, _, norms, _ = optimizer.update(sgd, params, moments, params, 0.0, multipliers)
    assert new["embedding"]["word"].tolist() == [1, 1, 1] and new["final_norm"]["scale"].tolist() == [0.5, 0.5]
    assert norms["grad_norm"] == pytest.approx(2**0.5)


def plain_gradients(params: Any, change: Any = lambda params: params) -> Any:
    """Return the gradients of the mean loss by autodiff on one device, through `change` of the params."""
    batch: Any = jax.tree.map(jnp.asarray, make_batch())
    allowed = model.Visibility(batch.segments, batch.context).dense()

    def mean_loss(params: Any) -> jax.Array:
        logits = model.apply(MODEL, change(params), batch.tokens, batch.positions, allowed)[..., :60]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
        return (losses * batch.loss_mask).sum() / batch.loss_mask.sum()

    return jax.grad(mean_loss)(params)


@pytest.mark.slow
def test_a_step_of_adapters_trains_them_alone(mesh_sizes: dict[str, int]) -> None:
    """Two steps against autodiff through products written out in numpy's way, and AdamW of numpy."""
    cfg = dataclasses.replace(CONFIG, lora=Lora(rank=2, alpha=8.0, targets=("blocks/attention",)))
    made = compiled(cfg, mesh_sizes)
    base = jax.device_get(made.base)
    state, metrics = run(cfg, mesh_sizes, 2, 2)
    assert OptimizerConfig() == cfg.optimizer

    def whole(adapters: Any) -> Any:
        attention = dict(base["blocks"]["attention"])
        for name, letters in (("qkv", "ldr,lrnck->ldnck"), ("output", "lnkr,lrd->lnkd")):
            pair = adapters["blocks"]["attention"][name]["kernel"]
            kernel = attention[name]["kernel"] + 4.0 * jnp.einsum(letters, pair["a"], pair["b"])
            attention[name] = {**attention[name], "kernel": kernel}
        return {**base, "blocks": {**base["blocks"], "attention": attention}}

    adapters = made.start.params
    flat = numpy_adamw.flat(adapters)
    moments = numpy_adamw.start(flat)
    for step in range(2):
        gradients = numpy_adamw.flat(plain_gradients(adapters, whole))
        norm = np.sqrt(sum((one**2).sum() for one in gradients.values()))
        assert metrics[step]["grad_norm"] == pytest.approx(float(norm), rel=1e-4)
        flat, moments = numpy_adamw.update(flat, gradients, moments, LR, **PAPER)
        adapters = numpy_adamw.like(adapters, flat)
    for name, array in numpy_adamw.flat(state.params).items():
        np.testing.assert_allclose(array, flat[name], atol=3e-4, err_msg=name)
    assert {leaf.shape for leaf in jax.tree.leaves(state.moments) if leaf.ndim} == {
        leaf.shape for leaf in jax.tree.leaves(state.params)
    }
    losses = made.evaluate(state.params, made.base, made.place(1))
    merged = compiled(CONFIG, mesh_sizes).evaluate(whole(state.params), (), made.place(1))
    np.testing.assert_allclose(losses, merged, rtol=1e-5, atol=1e-6)
