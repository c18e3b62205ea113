"""Compares the engine on a mesh of emulated devices with plain `jax.value_and_grad` on one; run in a subprocess.

`python -m tests.parallel.parity CASES.json` prints one JSON object a case; see `run_case` for the keys of a case.
"""

from __future__ import annotations

import dataclasses
import json
import os
import sys
from typing import Any

DEVICES = 8

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = str(DEVICES)
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the work

import jax  # noqa: E402 (reads the environment)
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402

from glm_jax import model  # noqa: E402
from glm_jax.model import GLMConfig  # noqa: E402
from glm_jax.parallel import mesh, partition  # noqa: E402
from glm_jax.training import engine, optimizer  # noqa: E402

SMALL = {"num_layers": 3, "hidden_size": 16, "num_heads": 8, "ffn_size": 16, "vocab_size": 48, "max_length": 16}
LENGTH, NUM_TOKENS, STEPS = 16, 41, 5
SHRINK, LOSS_SCALE = 0.3, 64.0
OPTIMIZER = optimizer.OptimizerConfig()


def make_batch(cfg: GLMConfig, rows: int) -> dict[str, np.ndarray]:
    """Make rows of two packed samples each, contexts of random lengths, and some padding at the end."""
    generator = np.random.default_rng(0)
    places = np.arange(LENGTH)
    border = generator.integers(4, 8, (rows, 1))
    end = generator.integers(12, LENGTH + 1, (rows, 1))
    segments = np.where(places < border, 1, np.where(places < end, 2, 0))
    context = (places < border - 2) | ((places >= border) & (places < border + 3)) & (segments > 0)
    tokens, targets = generator.integers(0, NUM_TOKENS, (2, rows, LENGTH))
    positions = np.where(places < border, places, places - border)
    if cfg.position == "learned_2d":
        positions = np.stack([positions, np.where(context, 0, places % 5)], axis=1)
    return {
        "tokens": tokens.astype(np.int32),
        "targets": targets.astype(np.int32),
        "positions": positions.astype(np.int32),
        "segments": segments.astype(np.int32),
        "context": context,
        "loss_mask": ((segments > 0) & ~context).astype(np.float32),
        "objective": generator.integers(0, 3, rows).astype(np.int32),
    }


def losses_by_token(cfg: engine.EngineConfig, params: Any, batch: dict[str, Any], key: jax.Array | None) -> jax.Array:
    """Give the masked cross-entropy [B, S] on one device."""
    weights = jax.tree.map(lambda param: param.astype(cfg.compute), params)
    allowed = model.visibility(jnp.asarray(batch["segments"]), jnp.asarray(batch["context"]))
    logits = model.apply(cfg.model, weights, batch["tokens"], batch["positions"], allowed, shrink=SHRINK, key=key)
    real = jax.nn.log_softmax(logits[..., : cfg.num_tokens])
    return -jnp.take_along_axis(real, batch["targets"][..., None], -1)[..., 0] * batch["loss_mask"]


def reference(cfg: engine.EngineConfig, params: Any, batch: dict[str, Any], key: jax.Array) -> Any:
    """Give the mean loss, its sums by objective and its gradients, on one device, by autodiff alone."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        rows, counts = losses_by_token(cfg, params, batch, key).sum(-1), batch["loss_mask"].sum(-1)
        by_objective = [(rows[mine].sum(), counts[mine].sum())
                        for mine in (batch["objective"] == index for index in range(cfg.objectives))]  # fmt: skip
        if cfg.normalization == "tokens":
            return rows.sum() / counts.sum(), by_objective
        return (rows / counts).mean(), by_objective

    return jax.value_and_grad(loss, has_aux=True)(params)


def error(expected: Any, got: Any) -> float:
    """Give the largest difference relative to the array's largest entry."""
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def build(case: dict[str, Any]) -> tuple[engine.EngineConfig, jax.sharding.Mesh, int, int]:
    """Give the config, the mesh, the rows and the microbatches of a case."""
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    glm = GLMConfig(**(SMALL | no_dropout | case.get("model", {})))
    compute = "float64" if case.get("x64") else "float32"
    cfg = dataclasses.replace(engine.EngineConfig(glm, NUM_TOKENS, 3, compute), **case.get("engine", {}))
    sizes: dict[str, int] = dict(zip(mesh.AXES, case["mesh"], strict=True))
    grid = mesh.build(sizes)
    rows, microbatches = case.get("rows", 16), case.get("microbatches", 2)
    engine.check(cfg, grid, rows, microbatches, LENGTH)
    return cfg, grid, rows, microbatches


def start_params(glm: GLMConfig, dtype: str) -> Any:
    """Initialise; biases and scales lie away from 0 and 1, so that they matter."""
    params = jax.jit(model.init, static_argnums=0)(glm, jax.random.key(0))
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.1 * generator.normal(size=leaf.shape), dtype), params)


def adam(params: Any, moments: Any, gradients: Any) -> tuple[Any, Any]:
    """Take a step of the real optimizer, at a learning rate that moves the loss."""
    return optimizer.update(OPTIMIZER, gradients, moments, params, jnp.asarray(0.01))[:2]


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case.

    Args:
        case: `mesh`, sizes of data, pipeline and tensor; and, optional, `model`, `engine` (changes to the configs),
            `rows`, `microbatches`, `x64`.

    Returns:
        The case; the largest relative errors: `loss`, of the loss sums over five optimizer steps; `gradient`, of any
        gradient of the first step, with its name in `worst`; `later_gradient`, of any gradient of any step;
        `token_losses`, of each token's loss without dropout; and whether every device ran exactly the blocks of its
        stage, microbatches times.
    """
    jax.config.update("jax_enable_x64", bool(case.get("x64")))
    cfg, grid, rows, microbatches = build(case)
    glm, axes, stages = cfg.model, model.logical_axes(cfg.model), grid.shape["pipeline"]
    params = start_params(glm, "float64" if case.get("x64") else "float32")
    batch, key = make_batch(glm, rows), jax.random.key(7)
    shardings = partition.shardings(grid, engine.state_specs(glm, grid))
    placed = jax.device_put(partition.pad_layers(params, axes, stages), shardings)
    parts = mesh.place(grid, batch, microbatches)
    gradients_of = jax.jit(lambda params: engine.value_and_grad(cfg, grid, params, parts, key, SHRINK, LOSS_SCALE))
    autodiff = jax.jit(lambda params: reference(cfg, params, batch, key))
    update, init = jax.jit(adam), jax.jit(optimizer.transformation(OPTIMIZER).init)
    moments, placed_moments = init(params), init(placed)
    token_losses = error(
        jax.jit(lambda params: losses_by_token(cfg, params, batch, None))(params),
        np.reshape(jax.jit(lambda params: engine.losses(cfg, grid, params, parts))(placed), (rows, LENGTH)),
    )
    loss, gradient, later, worst, exact = 0.0, 0.0, 0.0, "", True
    for step in range(STEPS):
        (_, by_objective), expected = autodiff(params)
        got = gradients_of(placed)
        errors = jax.tree.map(
            error, expected, partition.true_layers(jax.device_get(got.gradients), axes, glm.num_layers)
        )
        path, largest = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
        later = max(later, largest)
        if step == 0:
            gradient, worst = largest, jax.tree_util.keystr(path)
        loss = max(loss, error(np.asarray(by_objective).T, np.stack(got.sums)))
        held = partition.layers_held(glm.num_layers, stages)
        layers = np.clip(glm.num_layers - held * np.arange(stages), 0, held)
        exact &= bool((np.asarray(got.executed) == (microbatches * layers)[None, :, None, None]).all())
        params, moments = update(params, moments, expected)
        placed, placed_moments = update(placed, placed_moments, got.gradients)
    return {
        "case": case,
        "loss": loss,
        "gradient": gradient,
        "worst": worst,
        "later_gradient": later,
        "token_losses": token_losses,
        "exact_slots": exact,
    }


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(run_case(one)), flush=True)
