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
from glm_jax.training import engine  # noqa: E402

SMALL = {"num_layers": 3, "hidden_size": 16, "num_heads": 8, "ffn_size": 16, "vocab_size": 48, "max_length": 16}
LENGTH, NUM_TOKENS = 16, 41
SHRINK, LOSS_SCALE = 0.3, 64.0


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


def reference(cfg: engine.EngineConfig, params: Any, batch: dict[str, Any], key: Any) -> Any:
    """Give the mean loss, its sums by objective and its gradients, on one device, by autodiff alone."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        weights = jax.tree.map(lambda param: param.astype(cfg.compute), params)
        allowed = model.visibility(jnp.asarray(batch["segments"]), jnp.asarray(batch["context"]))
        logits = model.apply(cfg.model, weights, batch["tokens"], batch["positions"], allowed, shrink=SHRINK, key=key)[
            ..., : cfg.num_tokens
        ]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), batch["targets"][..., None], -1)[..., 0]
        mask = batch["loss_mask"]
        rows, counts = (-chosen * mask).sum(-1), mask.sum(-1)
        by_objective = [((rows * (batch["objective"] == i)).sum(), (counts * (batch["objective"] == i)).sum())
                        for i in range(cfg.objectives)]  # fmt: skip
        if cfg.normalization == "tokens":
            return rows.sum() / counts.sum(), by_objective
        return (rows / counts).mean(), by_objective

    return jax.jit(jax.value_and_grad(loss, has_aux=True))(params)


def error(expected: Any, got: Any) -> float:
    """Give the largest difference relative to the array's largest entry."""
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case.

    Args:
        case: `mesh`, sizes of data, pipeline and tensor; and, optional, `model`, `engine` (changes to the configs),
            `rows`, `microbatches`, `x64`.

    Returns:
        The case, the relative error of the loss sums and of the worst gradient with its name, and whether every device
        ran exactly the blocks of its stage, microbatches times.
    """
    jax.config.update("jax_enable_x64", bool(case.get("x64")))
    dtype = "float64" if case.get("x64") else "float32"
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    glm = GLMConfig(**(SMALL | no_dropout | case.get("model", {})))
    cfg = dataclasses.replace(engine.EngineConfig(glm, NUM_TOKENS, 3, dtype), **case.get("engine", {}))
    sizes: dict[str, int] = dict(zip(mesh.AXES, case["mesh"], strict=True))
    rows, microbatches = case.get("rows", 16), case.get("microbatches", 2)
    grid = mesh.build(sizes)
    engine.check(cfg, grid, rows, microbatches, LENGTH)
    params = jax.jit(model.init, static_argnums=0)(glm, jax.random.key(0))
    generator = np.random.default_rng(1)  # biases and scales away from 0 and 1, so that they are tested as well
    params = jax.tree.map(lambda leaf: np.asarray(leaf + 0.1 * generator.normal(size=leaf.shape), dtype), params)
    batch, key = make_batch(glm, rows), jax.random.key(7)
    (_, by_objective), expected = reference(cfg, params, batch, key)
    axes = model.logical_axes(glm)
    padded = partition.pad_layers(params, axes, sizes["pipeline"])
    placed = jax.device_put(padded, partition.shardings(grid, engine.state_specs(glm, grid)))
    parts = mesh.place(grid, batch, microbatches)
    step = jax.jit(lambda params, batch: engine.value_and_grad(cfg, grid, params, batch, key, SHRINK, LOSS_SCALE))
    got = step(placed, parts)
    gradients = partition.true_layers(jax.device_get(got.gradients), axes, glm.num_layers)
    errors = jax.tree.map(error, expected, gradients)
    worst = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
    held = partition.layers_held(glm.num_layers, sizes["pipeline"])
    layers = np.clip(glm.num_layers - held * np.arange(sizes["pipeline"]), 0, held)
    return {
        "case": case,
        "loss": error(np.asarray(by_objective).T, np.stack(got.sums)),
        "gradient": worst[1],
        "worst": jax.tree_util.keystr(worst[0]),
        "exact_slots": bool((np.asarray(got.executed) == (microbatches * layers)[None, :, None, None]).all()),
    }


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(run_case(one)), flush=True)
