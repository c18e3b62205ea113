"""Compares the engine on a mesh of emulated devices with plain `jax.value_and_grad` on one; run in a subprocess.

The plain side shares the model with the engine, but not the optimizer (see tests/training/numpy_adamw.py). Losses and
gradients are also compared with tests/model/numpy_reference.py, which shares neither model nor dropout nor shrink.

`python -m tests.parallel.parity CASES.json` prints one JSON object a case; see `run_case` for the keys of a case.
"""

from __future__ import annotations

import dataclasses
import json
import math
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
from glm_jax.data.rows.rows import Rows  # noqa: E402
from glm_jax.engine import bind, passes  # noqa: E402
from glm_jax.model import GLMConfig, attention_blockwise, attention_cores  # noqa: E402
from glm_jax.parallel import cross_entropy, mesh, partition  # noqa: E402
from glm_jax.training import optimizer  # noqa: E402
from tests.model import numpy_reference  # noqa: E402
from tests.training import numpy_adamw  # noqa: E402

SMALL = {"num_layers": 3, "hidden_size": 16, "num_heads": 8, "ffn_size": 16, "vocab_size": 48, "max_length": 16}
LENGTH, NUM_TOKENS, STEPS = 16, 41, 5
SHRINK, LOSS_SCALE = 0.3, 64.0
OPTIMIZER = optimizer.OptimizerConfig()
PAPER = {"beta1": 0.9, "beta2": 0.95, "epsilon": 1e-8, "weight_decay": 0.1, "clip_norm": 1.0}  # GLM-130B's, table 11
LR = 0.01  # moves the loss
attention_blockwise.BLOCK, attention_blockwise.SMALLEST = 8, 4  # so that a row has two blocks
cross_entropy.LOGITS, cross_entropy.SMALLEST = 1, 12  # so that a microbatch has several slices, the last not full
STEP_SIZE = 1e-5  # of the finite differences, along directions of size about 1 in each entry


def make_batch(cfg: GLMConfig, rows: int) -> Rows[np.ndarray]:
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
    return Rows(
        tokens=tokens.astype(np.int32),
        targets=targets.astype(np.int32),
        positions=positions.astype(np.int32),
        segments=segments.astype(np.int32),
        context=context,
        loss_mask=((segments > 0) & ~context).astype(np.float32),
        objective=generator.integers(0, 3, rows).astype(np.int32),
        source=np.zeros(rows, np.int32),
    )


def losses_by_token(
    cfg: bind.EngineConfig, params: Any, batch: Rows[Any], key: jax.Array | None
) -> tuple[jax.Array, jax.Array]:
    """Return the masked cross-entropy on one device, and the same with what z_loss adds: [B, S] each."""
    weights = jax.tree.map(lambda param: param.astype(cfg.compute), params)
    allowed = model.Visibility(jnp.asarray(batch.segments), jnp.asarray(batch.context))
    # the dense core, unless its masks of dropout are others
    core = attention_cores.CORES[cfg.attention if cfg.model.attention_dropout else "reference"]
    logits = model.apply(cfg.model, weights, batch.tokens, batch.positions, allowed, shrink=SHRINK, key=key, core=core)
    sums = jax.nn.logsumexp(logits[..., : cfg.num_tokens], -1)  # [B, S]
    losses = (sums - jnp.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]) * batch.loss_mask
    return losses, losses + cfg.z_loss * sums**2 * batch.loss_mask


def reference(cfg: bind.EngineConfig, params: Any, batch: Rows[Any], key: jax.Array) -> Any:
    """Return the mean loss, its sums by objective and its gradients, on one device, by autodiff alone."""

    def loss(params: Any) -> tuple[jax.Array, Any]:
        rows, whole = (losses.sum(-1) for losses in losses_by_token(cfg, params, batch, key))  # [B] each
        counts = batch.loss_mask.sum(-1)  # [B]
        by_objective = [(rows[mine].sum(), counts[mine].sum())
                        for mine in (batch.objective == index for index in range(cfg.objectives))]  # fmt: skip
        if cfg.normalization == "tokens":
            return whole.sum() / counts.sum(), by_objective
        return (whole / counts).mean(), by_objective

    return jax.value_and_grad(loss, has_aux=True)(params)


class Independent:
    """The same losses and slopes in float64 numpy, with masks from the reference's own code."""

    def __init__(self, cfg: bind.EngineConfig, batch: Rows[np.ndarray], key: jax.Array) -> None:
        self.cfg, self.batch, segments = cfg, batch, batch.segments
        causal = np.tril(np.ones((LENGTH, LENGTH), bool))
        self.allowed = (segments[:, :, None] == segments[:, None]) & (causal | batch.context[:, None])  # [B, S, S]
        drops = cfg.model.attention_dropout + cfg.model.hidden_dropout > 0
        size = attention_blockwise.BLOCK if cfg.attention == "blockwise" else None
        self.masks = numpy_reference.dropout_masks(cfg.model, key, len(segments), LENGTH, size) if drops else None

    def rows(self, params: Any, z_loss: float = 0.0) -> np.ndarray:
        """Return the summed loss of each row [B]."""
        batch = self.batch
        inputs = batch.tokens, batch.positions, self.allowed, self.masks
        logits = numpy_reference.forward(self.cfg.model, params, *inputs)[..., :NUM_TOKENS]
        chosen = np.take_along_axis(logits, batch.targets[..., None], -1)[..., 0]  # [B, S]
        sums = np.log(np.exp(logits).sum(-1))  # [B, S]
        return ((sums - chosen + z_loss * sums**2) * batch.loss_mask).sum(-1)

    def by_objective(self, params: Any) -> np.ndarray:
        """Return the summed losses of the objectives [O]."""
        return np.bincount(self.batch.objective, self.rows(double(params)), self.cfg.objectives)

    def mean(self, params: Any) -> float:
        """Return the loss that is differentiated."""
        rows, counts = self.rows(params, self.cfg.z_loss), self.batch.loss_mask.sum(-1)
        return float(rows.sum() / counts.sum() if self.cfg.normalization == "tokens" else (rows / counts).mean())

    def slope_error(self, params: Any, gradients: Any) -> float:
        """Compare the slope along a random direction with that of `gradients`, in units of their norm.

        The word embedding moves SHRINK times as far at the input as at the head, like its gradient.
        """
        params, gradients, generator = double(params), double(gradients), np.random.default_rng(2)
        direction = jax.tree.map(lambda leaf: generator.standard_normal(leaf.shape), params)
        inside = {**direction, "embedding": {**direction["embedding"], "word": SHRINK * direction["embedding"]["word"]}}

        def moved(by: float) -> float:
            ends = jax.tree.map(lambda leaf, change: leaf + by * change, params, inside)
            return self.mean({**ends, "head": params["embedding"]["word"] + by * direction["embedding"]["word"]})

        measured = (moved(STEP_SIZE) - moved(-STEP_SIZE)) / (2 * STEP_SIZE)
        told = sum(jax.tree.leaves(jax.tree.map(lambda leaf, change: (leaf * change).sum(), gradients, direction)))
        norm = sum(jax.tree.leaves(jax.tree.map(lambda leaf: (leaf**2).sum(), gradients))) ** 0.5
        return float(abs(measured - told) / norm)


def double(tree: Any) -> Any:
    """Return float64 numpy arrays."""
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


def error(expected: Any, got: Any) -> float:
    """Return the largest difference relative to the array's largest entry."""
    expected, got = np.asarray(expected, np.float64), np.asarray(got, np.float64)
    return float(np.abs(expected - got).max() / max(np.abs(expected).max(), 1e-30))


def build(case: dict[str, Any]) -> tuple[bind.EngineConfig, jax.sharding.Mesh, int, int]:
    """Return the config, the mesh, the rows and the microbatches of a case."""
    no_dropout = {"attention_dropout": 0.0, "hidden_dropout": 0.0}
    glm = GLMConfig(**(SMALL | no_dropout | case.get("model", {})))
    compute = "float64" if case.get("x64") else "float32"
    cfg = dataclasses.replace(bind.EngineConfig(glm, NUM_TOKENS, 3, compute), **case.get("engine", {}))
    sizes: dict[str, int] = dict(zip(mesh.AXES, case["mesh"], strict=True))
    grid = mesh.build(sizes)
    rows, microbatches = case.get("rows", 16), case.get("microbatches", 2)
    bind.check(cfg, grid, rows, microbatches, LENGTH)
    return cfg, grid, rows, microbatches


def start_params(glm: GLMConfig, dtype: str) -> Any:
    """Initialise params, with biases and scales away from 0 and 1, so that they matter."""
    params = jax.device_get(jax.jit(model.init, static_argnums=0)(glm, jax.random.key(0)))
    generator = np.random.default_rng(1)
    return jax.tree.map(lambda leaf: np.asarray(leaf + 0.1 * generator.normal(size=leaf.shape), dtype), params)


def adam(params: Any, moments: Any, gradients: Any) -> tuple[Any, Any]:
    """Take a step of the real optimizer."""
    return optimizer.update(OPTIMIZER, gradients, moments, params, jnp.asarray(LR))[:2]


def plain_adam(params: Any, moments: numpy_adamw.Moments | None, gradients: Any) -> tuple[Any, numpy_adamw.Moments]:
    """Take the same step in numpy."""
    flat = numpy_adamw.flat(params)
    moved, moments = numpy_adamw.update(
        flat, numpy_adamw.flat(gradients), moments or numpy_adamw.start(flat), LR, **PAPER
    )
    return numpy_adamw.like(params, moved), moments


def ran_own_blocks(executed: np.ndarray, layers: int, microbatches: int) -> bool:
    """Whether every device ran exactly the blocks of its stage, `microbatches` times; executed [data, P, tensor, 2]."""
    stages = executed.shape[1]
    held = math.ceil(layers / stages)
    blocks = np.clip(layers - held * np.arange(stages), 0, held)  # [P]
    return bool((executed == (microbatches * blocks)[:, None, None]).all())


def run_case(case: dict[str, Any]) -> dict[str, Any]:
    """Run one case.

    Args:
        case: `mesh`, the sizes of data, pipeline and tensor; and optionally `model` and `engine` (changes to the
            configs), `rows`, `microbatches` and `x64`.

    Returns:
        The case, and the largest relative errors: `loss`, of the loss sums over five optimizer steps; `gradient`, of
        any gradient of the first step, named in `worst`; `later_gradient`, of any gradient of any step;
        `token_losses`, of each token's loss without dropout. Against float64 numpy, for float32 and float64:
        `numpy_loss`, of the loss sums of the first and the last step, and `numpy_slope`, of the first gradient. Also
        `exact_slots`, see `ran_own_blocks`.
    """
    jax.config.update("jax_enable_x64", bool(case.get("x64")))
    cfg, grid, rows, microbatches = build(case)
    glm, axes, stages = cfg.model, model.logical_axes(cfg.model), grid.shape["pipeline"]
    params = start_params(glm, "float64" if case.get("x64") else "float32")
    batch, key = make_batch(glm, rows), jax.random.key(7)
    shardings = partition.shardings(grid, bind.state_specs(glm, grid))
    pad = jax.jit(lambda params: partition.pad_layers(params, axes, stages), out_shardings=shardings)
    placed = pad(params)
    parts = mesh.place(grid, batch, microbatches)
    gradients_of = jax.jit(lambda params: passes.value_and_grad(cfg, grid, params, parts, key, SHRINK, LOSS_SCALE))
    autodiff = jax.jit(lambda params: reference(cfg, params, batch, key))
    update, moments = jax.jit(adam), None
    placed_moments = jax.jit(optimizer.transformation(OPTIMIZER).init)(placed)
    independent = Independent(cfg, batch, key) if cfg.compute in ("float32", "float64") else None
    token_losses = error(
        jax.jit(lambda params: losses_by_token(cfg, params, batch, None)[0])(params),
        np.reshape(jax.jit(lambda params: passes.losses(cfg, grid, params, parts))(placed), (rows, LENGTH)),
    )
    loss, gradient, later, worst, exact, numpy_loss, numpy_slope = 0.0, 0.0, 0.0, "", True, 0.0, 0.0
    for step in range(STEPS):
        (_, by_objective), expected = autodiff(params)
        got = gradients_of(placed)
        found = partition.true_layers(jax.device_get(got.gradients), axes, glm.num_layers)
        errors = jax.tree.map(error, expected, found)
        path, largest = max(jax.tree_util.tree_leaves_with_path(errors), key=lambda item: item[1])
        later = max(later, largest)
        if step == 0:
            gradient, worst = largest, jax.tree_util.keystr(path)
            numpy_slope = independent.slope_error(params, found) if independent else 0.0
        if independent and step in (0, STEPS - 1):
            numpy_loss = max(numpy_loss, error(independent.by_objective(params), got.sums.loss))
        loss = max(loss, error(np.asarray(by_objective).T, np.stack(got.sums)))
        exact &= ran_own_blocks(np.asarray(got.executed), glm.num_layers, microbatches)
        params, moments = plain_adam(params, moments, expected)
        placed, placed_moments = update(placed, placed_moments, got.gradients)
    return {
        "case": case,
        "loss": loss,
        "gradient": gradient,
        "worst": worst,
        "later_gradient": later,
        "token_losses": token_losses,
        "numpy_loss": numpy_loss,
        "numpy_slope": numpy_slope,
        "exact_slots": exact,
    }


if __name__ == "__main__":
    for one in json.loads(sys.argv[1]):
        print(json.dumps(run_case(one)), flush=True)
