"""What a device holds of a state while it is saved and restored, from the shardings that both use."""

import runpy

import jax
import numpy as np
import pytest

from glm_jax.config import resolve
from glm_jax.engine import build
from glm_jax.parallel.mesh import build as build_mesh
from glm_jax.training.precision import initial_loss_scale
from glm_jax.training.state import TrainState, at_step, disk_targets
from glm_jax.training.stretch import step_config


@pytest.mark.parametrize(("mesh", "gigabytes"), [((24, 8, 4), 2.1), ((1, 8, 1), 193.5)])
def test_glm_130b_is_saved_in_its_true_layers_and_split_over_every_axis(
    mesh: tuple[int, int, int], gigabytes: float
) -> None:
    """Params and two moments, 12 bytes for each of 128.7e9 params, are 1,544 GB."""
    config = runpy.run_path("experiments/glm_130b.py")["get_config"]()
    config.mesh.update(dict(zip(("data", "pipeline", "tensor"), mesh, strict=True)))
    experiment = resolve(config)
    engine, grid = build(experiment, 150_344, abstract=True)
    targets = disk_targets(step_config(experiment, engine), grid)
    arrays = jax.tree.leaves(targets)
    assert {leaf.shape[0] for leaf in jax.tree.leaves(targets["params"]["blocks"])} == {70}
    assert sum(array.size for array in jax.tree.leaves(targets["params"])) == 128_697_794_560
    held = sum(np.prod(array.sharding.shard_shape(array.shape)) * array.dtype.itemsize for array in arrays)
    assert held / 1e9 <= gigabytes and held * np.prod(mesh) == pytest.approx(12 * 128_697_794_560, rel=0.005)


@pytest.mark.parametrize("samples", [5, 2**31 - 1, 2**31, 500_000 * 8192])
def test_a_run_of_more_rows_than_an_int32_holds_keeps_its_place(samples: int) -> None:
    mesh = build_mesh({"data": 1, "pipeline": 1, "tensor": 1})
    state = TrainState(jax.numpy.int32(1), jax.numpy.int32(1), {}, {}, initial_loss_scale(None))
    placed = at_step(mesh, state, 7, samples)
    assert int(placed.step) == 7 and (int(placed.samples) - samples) % 2**32 == 0
