"""One process's part of a gradient on a mesh of 8 emulated devices, 1 or 2 processes; run in subprocesses.

`python -m tests.parallel.two_processes PORT COUNT INDEX` prints one JSON object a mesh, from process 0: which
processes hold each stage, how many rows this process reads, and the sums and norms that the processes must agree on.
"""

from __future__ import annotations

import json
import os
import sys

PORT, COUNT, INDEX = (int(argument) for argument in sys.argv[1:4]) if __name__ == "__main__" else (0, 1, 0)

if __name__ == "__main__":
    os.environ["JAX_NUM_CPU_DEVICES"] = str(8 // COUNT)
    os.environ["JAX_PLATFORMS"] = "cpu"
    os.environ["XLA_FLAGS"] = "--xla_backend_optimization_level=0"  # compiling is most of the work

import jax  # noqa: E402 (reads the environment)
import numpy as np  # noqa: E402

from glm_jax import model  # noqa: E402
from glm_jax.engine import bind, passes  # noqa: E402
from glm_jax.parallel import mesh, partition, processes  # noqa: E402
from tests.parallel import parity  # noqa: E402
from tests.parallel.together import whole  # noqa: E402

MESHES = [1, 2, 4], [2, 2, 2]  # with two processes each holds a stage, then a member of data


def run(shape: list[int]) -> None:
    """Compute the gradient and print its digest."""
    case = {"mesh": shape, "model": {"attention_dropout": 0.2, "hidden_dropout": 0.2}}
    cfg, grid, rows, microbatches = parity.build(case)
    glm, axes = cfg.model, model.logical_axes(cfg.model)
    params = partition.pad_layers(parity.start_params(glm, "float32"), axes, grid.shape["pipeline"])
    shardings = partition.shardings(grid, bind.state_specs(glm, grid))
    placed = jax.tree.map(
        lambda leaf, sharding: jax.make_array_from_callback(
            leaf.shape, sharding, lambda index: np.asarray(leaf)[index]
        ),
        params,
        shardings,
    )
    wanted = mesh.local_rows(grid, rows, microbatches)  # [M, B/M of this process]
    batch = mesh.place(grid, parity.make_batch(glm, rows).take(wanted.ravel()), microbatches)
    step = jax.jit(lambda params, batch: passes.value_and_grad(cfg, grid, params, batch, jax.random.key(7), 0.3, 64.0))
    got = processes.compiled_together(step)(placed, batch)
    gradients = whole(grid, got.gradients)
    if INDEX == 0:
        stages = [sorted({device.process_index for device in grid.devices[:, stage].ravel()}) for stage in range(2)]
        leaves = [np.asarray(leaf, np.float64) for leaf in jax.tree.leaves(gradients)]
        report = {
            "stages": stages,
            "rows": wanted.size,
            "loss": np.asarray(got.sums.loss).tolist(),
            "gradients": [[leaf.sum(), np.abs(leaf).sum(), np.abs(leaf).max()] for leaf in leaves],
        }
        print(json.dumps(report), flush=True)


if __name__ == "__main__":
    if COUNT > 1:
        processes.start(f"127.0.0.1:{PORT}", COUNT, INDEX, timeout=300)
    for shape in MESHES:
        run(shape)
