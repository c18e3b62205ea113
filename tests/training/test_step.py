"""train_step against plain value_and_grad, on the mesh of this test run; test_step_on_a_mesh.py has more devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.rows import Rows
from glm_jax.engine.bind import EngineConfig, row_weights
from glm_jax.model import GLMConfig, transformer
from glm_jax.model.positions import position_terms
from glm_jax.parallel import mesh
from glm_jax.training import optimizer
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.precision import LossScale, LossScaleConfig
from glm_jax.training.state import StepConfig, TrainState, at_step, create_base, create_state, true_layers
from glm_jax.training.step import compile_steps, controls
from tests.model import numpy_reference

MODEL = GLMConfig(2, 32, 4, 48, 64, max_length=16, attention_dropout=0.0, hidden_dropout=0.0)
LR = 1e-2
CONFIG = StepConfig(
    engine=EngineConfig(MODEL, num_tokens=60, objectives=len(OBJECTIVES), attention_scores=True),
    optimizer=OptimizerConfig(),
    loss_scale=None,
    seed=3,
)
DROPPING = dataclasses.replace(MODEL, attention_dropout=0.1, hidden_dropout=0.2)
WITH_DROPOUT = dataclasses.replace(
    CONFIG, engine=dataclasses.replace(CONFIG.engine, model=DROPPING, attention_scores=False)
)


def make_batch(rows: int = 8, length: int = 16) -> Rows[np.ndarray]:
    """Make rows of two packed segments and some padding, with a few unevenly spread targets."""
    draw = np.random.default_rng(0)
    places = np.arange(length)
    segments = np.where(places < 9, 1, np.where(places < 14, 2, 0))
    context = np.isin(places, [0, 1, 2, 3, 9, 10])
    target = (segments > 0) & ~context
    loss_mask = (target & (draw.random((rows, length)) < 0.7)).astype(np.float32)
    loss_mask[1] = 0  # a row without a target
    return Rows(
        tokens=draw.integers(0, 60, (rows, length), np.int32),
        targets=draw.integers(0, 60, (rows, length), np.int32),
        positions=np.broadcast_to(np.where(places < 9, places, places - 9), (rows, length)).astype(np.int32),
        segments=np.broadcast_to(segments, (rows, length)).astype(np.int32),
        context=np.broadcast_to(context, (rows, length)),
        loss_mask=loss_mask,
        objective=(np.arange(rows) % 2).astype(np.int32),
        source=np.zeros(rows, np.int32),
    )


class Compiled(NamedTuple):
    """The train step, the evaluation and the first state, compiled once for each config and mesh."""

    mesh: jax.sharding.Mesh
    train: Callable[..., Any]
    evaluate: Callable[..., Any]
    start: TrainState  # numpy arrays
    shardings: TrainState
    base: Any  # of adapters

    def state(self) -> TrainState:
        return jax.device_put(self.start, self.shardings)

    def step(self, state: TrainState, microbatches: int, shrink: float = 1.0, request: int = 0) -> Any:
        return self.train(state, self.place(microbatches), controls(self.mesh, LR, shrink, request), self.base)

    def place(self, microbatches: int) -> dict[str, Any]:
        return mesh.place(self.mesh, make_batch(), microbatches)


@functools.cache
def compiled_on(cfg: StepConfig, sizes: tuple[int, ...]) -> Compiled:
    grid = mesh.build(dict(zip(mesh.AXES, sizes, strict=True)))
    state = create_state(cfg, grid)
    shardings = jax.tree.map(lambda array: array.sharding, state)
    return Compiled(grid, *compile_steps(cfg, grid), jax.device_get(state), shardings, create_base(cfg, grid))


def compiled(cfg: StepConfig, sizes: dict[str, int]) -> Compiled:
    return compiled_on(cfg, tuple(sizes.values()))


def run(
    cfg: StepConfig, sizes: dict[str, int], microbatches: int, steps: int, shrink: float = 1.0
) -> tuple[Any, list[dict[str, Any]]]:
    made, metrics = compiled(cfg, sizes), []
    state = made.state()
    for _ in range(steps):
        state, measured = made.step(state, microbatches, shrink)
        metrics.append(jax.device_get(measured))
    return jax.device_get(state), metrics


def plain_step(cfg: StepConfig, state: TrainState) -> tuple[jax.Array, Any, Any]:
    """Take the same step with jax.value_and_grad over the whole batch at once."""
    batch: Rows[jax.Array] = jax.tree.map(jnp.asarray, make_batch())

    def mean_loss(params: Any) -> jax.Array:
        allowed = model.Visibility(batch.segments, batch.context).dense()
        logits = model.apply(cfg.engine.model, params, batch.tokens, batch.positions, allowed)[
            ..., : cfg.engine.num_tokens
        ]
        losses = -jnp.take_along_axis(jax.nn.log_softmax(logits), batch.targets[..., None], -1)[..., 0]
        return (losses * batch.loss_mask).sum() / batch.loss_mask.sum()

    loss, gradients = jax.value_and_grad(mean_loss)(state.params)
    params, _, _, _ = optimizer.update(cfg.optimizer, gradients, state.moments, state.params, jnp.float32(LR))
    return loss, gradients, params


@pytest.mark.parametrize("microbatches", [1, pytest.param(4, marks=[pytest.mark.slow, pytest.mark.oldest])])
def test_a_step_is_adamw_on_the_mean_over_all_target_tokens(mesh_sizes: dict[str, int], microbatches: int) -> None:
    loss, gradients, params = plain_step(CONFIG, compiled(CONFIG, mesh_sizes).start)
    state, (metrics,) = run(CONFIG, mesh_sizes, microbatches, 1)
    sums, batch = metrics["sums"], make_batch()
    assert sums.loss.sum() / sums.targets.sum() == pytest.approx(float(loss), rel=1e-6)
    assert sums.targets[:2].tolist() == [batch.loss_mask[kind::2].sum() for kind in (0, 1)]
    assert len(sums.loss) == len(OBJECTIVES) and metrics["tokens"] == 8 * 14
    norm = np.sqrt(sum((leaf**2).sum() for leaf in jax.tree.leaves(gradients)))
    assert metrics["grad_norm"] == pytest.approx(float(norm), rel=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=2e-4), state.params, params)
    assert (state.step, state.samples) == (1, 8)


def residual_rms(cfg: StepConfig, params: Any) -> list[float]:
    """Run the layers one by one and measure the residual stream after each."""
    glm = cfg.engine.model
    batch: Rows[jax.Array] = jax.tree.map(jnp.asarray, make_batch())
    allowed = model.Visibility(batch.segments, batch.context).dense()
    x = transformer.embed(glm, params, batch.tokens, batch.positions)
    terms, scales = position_terms(glm, batch.positions, x.dtype), []
    for layer in range(glm.num_layers):
        weights = jax.tree.map(lambda array, layer=layer: array[layer], params["blocks"])
        x = transformer.block(glm, weights, x, allowed, terms, jnp.int32(layer))[0]
        scales.append(float(jnp.sqrt(jnp.mean(x**2))))
    return scales


def largest_scores(params: Any, monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Run the reference, and return the largest score of each layer between tokens that see each other."""
    found, attend = [], numpy_reference.attention

    def spy(cfg: GLMConfig, layer: Any, x: np.ndarray, p: np.ndarray, allowed: np.ndarray, kept: None) -> np.ndarray:
        scores = [numpy_reference.head_scores(cfg, layer, x, p, head) for head in range(4)]
        found.append(max(of_head[:14][allowed[:14]].max() for of_head in scores))  # the rest is padding
        return attend(cfg, layer, x, p, allowed, kept)

    monkeypatch.setattr(numpy_reference, "attention", spy)
    batch = make_batch()
    numpy_reference.forward(MODEL, wide(params), batch.tokens, batch.positions, allowed_in(batch))
    return np.reshape(found, (8, 2)).max(0).tolist()  # of rows and layers


def test_metrics_measure_the_layers_and_carry_requests(
    mesh_sizes: dict[str, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    made = compiled(CONFIG, mesh_sizes)
    _, metrics = made.step(made.state(), 4, request=2)
    assert metrics["activation_rms"].tolist() == pytest.approx(residual_rms(CONFIG, made.start.params), rel=1e-5)
    scores = largest_scores(true_layers(CONFIG, made.start).params, monkeypatch)
    assert metrics["attention_scores"].tolist() == pytest.approx(scores, rel=1e-5)
    assert metrics["requests"] == 2 and made.step(made.state(), 4)[1]["requests"] == 0
    groups = [float(value) ** 2 for name, value in metrics.items() if name.startswith("grad_norm/")]
    assert len(groups) == 4 and sum(groups) ** 0.5 == pytest.approx(float(metrics["grad_norm"]), rel=1e-5)


@pytest.mark.slow
def test_microbatches_and_meshes_do_not_change_five_steps(mesh_sizes: dict[str, int]) -> None:
    one = {"data": 1, "pipeline": 1, "tensor": 1}
    for config, microbatches in ((CONFIG, 4), (WITH_DROPOUT, 2)):
        losses = [
            [float(step["sums"].loss.sum()) for step in run(config, sizes, count, 5)[1]]
            for sizes, count in ((one, 1), (mesh_sizes, microbatches))
        ]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        assert losses[0][4] < losses[0][0]


def wide(params: Any) -> Any:
    return jax.tree.map(lambda array: np.asarray(array, np.float64), params)


def allowed_in(batch: Rows[np.ndarray]) -> np.ndarray:
    """Return which key a query may see [B, S, S]."""
    seen = np.tril(np.ones((16, 16), bool)) | batch.context[:, None]
    return seen & (batch.segments[:, :, None] == batch.segments[:, None])


def reference_loss(cfg: GLMConfig, params: Any, key: jax.Array) -> float:
    """Return the summed loss of the batch in float64 numpy, with the masks of a step's dropout key."""
    batch = make_batch()
    masks = numpy_reference.dropout_masks(cfg, key, *batch.tokens.shape)
    logits = numpy_reference.forward(cfg, wide(params), batch.tokens, batch.positions, allowed_in(batch), masks)[
        ..., :60
    ]
    chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]  # [B, S]
    return float(((np.log(np.exp(logits).sum(-1)) - chosen) * batch.loss_mask).sum())


@pytest.mark.slow
@pytest.mark.oldest
def test_dropout_follows_from_the_seed_and_the_step(mesh_sizes: dict[str, int]) -> None:
    """At a learning rate of 0 the steps differ only by their masks."""
    made, found = compiled(WITH_DROPOUT, mesh_sizes), []
    params = true_layers(WITH_DROPOUT, made.start).params
    for first in (0, 0, 7):
        state = at_step(made.mesh, made.state(), first, 0)
        for step in (first, first + 1):
            state, metrics = made.train(state, made.place(2), controls(made.mesh, 0.0, 1.0), ())
            found.append((step, float(metrics["sums"].loss.sum())))
            assert "attention_scores" not in metrics
    assert found[:2] == found[2:4]
    keys = {step: jax.random.fold_in(jax.random.key(3), step) for step, _ in found}
    expected = {step: reference_loss(DROPPING, params, key) for step, key in keys.items()}
    assert [loss for _, loss in found] == pytest.approx([expected[step] for step, _ in found], rel=1e-5)
    drawn = [*expected.values(), reference_loss(DROPPING, params, jax.random.fold_in(jax.random.key(4), 0))]
    assert np.abs(np.subtract.outer(drawn, drawn))[np.triu_indices(5, 1)].min() > 1e-3 * drawn[0]  # so it can tell


def test_the_seed_decides_the_first_params(mesh_sizes: dict[str, int]) -> None:
    expected = jax.jit(model.init, static_argnums=0)(MODEL, jax.random.key(3))
    start = compiled(CONFIG, mesh_sizes).start
    np.testing.assert_allclose(start.params["embedding"]["word"], expected["embedding"]["word"], rtol=1e-5)


@pytest.mark.slow
def test_the_shrink_reaches_the_embedding_alone(mesh_sizes: dict[str, int]) -> None:
    plain, (before,) = run(CONFIG, mesh_sizes, 4, 1)
    shrunk, (after,) = run(dataclasses.replace(CONFIG, shrinks=True), mesh_sizes, 4, 1, shrink=0.0)
    assert after["sums"].loss.sum() == pytest.approx(before["sums"].loss.sum(), rel=1e-6)
    assert after["grad_norm"] < before["grad_norm"]
    first = {name: state.moments[0].mu for name, state in (("plain", plain), ("shrunk", shrunk))}
    scale = min(1.0, 1.0 / before["grad_norm"]) / min(1.0, 1.0 / after["grad_norm"])  # ratio of the clipping factors
    blocks = [first["plain"]["blocks"], jax.tree.map(lambda array: array * scale, first["shrunk"]["blocks"])]
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-6), *blocks)
    assert np.abs(first["plain"]["embedding"]["word"] - scale * first["shrunk"]["embedding"]["word"]).max() > 1e-4


def test_a_batch_without_a_target_decays_and_moves_nothing_else(mesh_sizes: dict[str, int]) -> None:
    made = compiled(CONFIG, mesh_sizes)
    batch = make_batch()._replace(loss_mask=np.zeros((8, 16), np.float32))
    state, metrics = made.train(made.state(), mesh.place(made.mesh, batch, 4), controls(made.mesh, LR, 1.0), ())
    assert metrics["grad_norm"] == 0 and metrics["skipped"] == 0 and not metrics["sums"].targets.any()
    before, after = made.start.params["embedding"]["word"], jax.device_get(state.params)["embedding"]["word"]
    np.testing.assert_allclose(after, before * (1 - LR * 0.1), rtol=1e-5)
    jax.tree.map(lambda array, sharding: array.sharding.is_equivalent_to(sharding, array.ndim) or pytest.fail(),
                 state, made.shardings)  # fmt: skip


def test_rows_weigh_alike_or_by_their_targets() -> None:
    counts = jnp.array([0.0, 1.0, 4.0])
    assert row_weights(CONFIG.engine, counts).tolist() == [1, 1, 1]
    by_row = dataclasses.replace(CONFIG.engine, normalization="microbatch")
    assert row_weights(by_row, counts).tolist() == [1, 1, 0.25]


def test_counters_and_scale_are_set_and_what_was_skipped_stays(mesh_sizes: dict[str, int]) -> None:
    made = compiled(CONFIG, mesh_sizes)
    state = made.state()
    skipped = jax.device_put(jnp.int32(5), state.loss_scale.skipped.sharding)
    state = state._replace(loss_scale=state.loss_scale._replace(skipped=skipped))
    kept, moved = (
        at_step(made.mesh, state, 9, 72),
        at_step(made.mesh, state, 9, 72, LossScale(*map(jnp.int32, (8, 1, 2, 3)))),
    )
    assert [int(number) for number in (kept.step, kept.samples, *kept.loss_scale)] == [9, 72, 1, 0, 1, 5]
    assert [int(number) for number in moved.loss_scale] == [8, 1, 2, 5]
    assert kept.params is state.params and kept.moments is state.moments


def in_half(compute: str) -> StepConfig:
    engine = dataclasses.replace(CONFIG.engine, compute=compute)
    scale = LossScaleConfig(initial=2.0**10, hysteresis=1) if compute == "float16" else None
    return dataclasses.replace(CONFIG, engine=engine, loss_scale=scale)


@pytest.mark.slow
def test_a_step_that_overflows_changes_only_scale_and_counters(mesh_sizes: dict[str, int]) -> None:
    made = compiled(in_half("float16"), mesh_sizes)
    state = made.state()
    too_high = state.loss_scale._replace(scale=jax.device_put(jnp.float32(2.0**40), state.loss_scale.scale.sharding))
    after, _ = made.step(state._replace(loss_scale=too_high), 4)
    after = jax.device_get(after)
    jax.tree.map(np.testing.assert_array_equal, (made.start.params, made.start.moments), (after.params, after.moments))
    assert after.loss_scale.scale == 2.0**39 and after.loss_scale.skipped == 1 and after.step == 1


@pytest.mark.slow
@pytest.mark.parametrize("compute, tolerance", [("bfloat16", 0.03), ("float16", 0.005)])
def test_half_precision_stays_near_float32(mesh_sizes: dict[str, int], compute: str, tolerance: float) -> None:
    half = run(in_half(compute), mesh_sizes, 4, 5)[1]
    single = run(CONFIG, mesh_sizes, 4, 5)[1]
    for a, b in zip(half, single, strict=True):
        assert a["sums"].loss.sum() == pytest.approx(b["sums"].loss.sum(), rel=tolerance)
    assert half[-1]["skipped"] == 0


def test_evaluation_gives_the_loss_of_every_target(mesh_sizes: dict[str, int]) -> None:
    made, batch = compiled(CONFIG, mesh_sizes), make_batch()
    losses = np.asarray(made.evaluate(made.state().params, (), made.place(1)))[0]
    assert losses.shape == (8, 16) and (losses[batch.loss_mask == 0] == 0).all()
    loss, _, _ = plain_step(CONFIG, made.start)
    assert losses.sum() / batch.loss_mask.sum() == pytest.approx(float(loss), rel=1e-6)
