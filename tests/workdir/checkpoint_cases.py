"""Save a state under one mesh of eight emulated devices and restore it under others; test_checkpoint.py runs this."""

import os
import sys

os.environ["JAX_NUM_CPU_DEVICES"] = "8"

import dataclasses
import json
from pathlib import Path

import jax
import numpy as np

from glm_jax.engine.bind import EngineConfig
from glm_jax.interop import arrays
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.state import StepConfig, TrainState, create_state, disk_targets, from_disk, to_disk, true_layers
from glm_jax.types import Tree
from glm_jax.workdir.checkpoint_format import open_params
from glm_jax.workdir.checkpoints import Checkpoints

GLM = GLMConfig(7, 32, 4, 48, 96, max_length=16)  # 7 layers: 3 stages of 3 or 2 of 4, the last one padded
CONFIG = StepConfig(EngineConfig(GLM, 60, 4), OptimizerConfig(), None, seed=3)
MESHES = [(1, 3, 2), (2, 2, 2), (8, 1, 1), (1, 1, 1)]


def build(sizes: tuple[int, ...]) -> jax.sharding.Mesh:
    return mesh.build(dict(zip(mesh.AXES, sizes, strict=True)))


def whole(state: TrainState) -> TrainState:
    return jax.device_get(true_layers(CONFIG, state))


def places(tree: Tree) -> Tree:
    """Return the shape that every array has on a device."""
    return jax.tree.map(lambda array: array.sharding.shard_shape(array.shape), tree)


def main(workdir: Path) -> None:
    for written in MESHES:
        folder = workdir / "x".join(map(str, written))
        writer = build(written)
        state = create_state(CONFIG, writer)
        # moments that differ from one another, and padding that must not reach the disk
        noise = jax.tree.map(lambda array: array + array.dtype.type(1), state.moments)
        state = state._replace(moments=noise, step=state.step + 5)
        checkpoints, items = Checkpoints(folder), to_disk(CONFIG, writer, state)
        assert places(items) == places(disk_targets(CONFIG, writer))
        checkpoints.save(items, {"step": 5, "samples": 40})
        checkpoints.close()
        expected = whole(state)
        for read in MESHES:
            checkpoints = Checkpoints(folder)
            restored = checkpoints.restore(disk_targets(CONFIG, build(read)))
            checkpoints.close()
            assert restored is not None and places(restored.items) == places(disk_targets(CONFIG, build(read)))
            jax.tree.map(np.testing.assert_array_equal, whole(from_disk(CONFIG, build(read), restored.items)), expected)
            assert restored.run == {"step": 5, "samples": 40}
        params = arrays.load(open_params(folder / "checkpoints/5"))
        assert {leaf.shape[0] for leaf in jax.tree.leaves(params["blocks"])} == {GLM.num_layers}
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected.params)
    other = dataclasses.replace(
        CONFIG, engine=dataclasses.replace(CONFIG.engine, model=dataclasses.replace(GLM, ffn_size=64))
    )
    checkpoints = Checkpoints(workdir / "1x1x1")
    try:
        checkpoints.restore(disk_targets(other, build((1, 1, 1))))
    except Exception as error:  # noqa: BLE001 (the test checks its type and text)
        print(json.dumps([type(error).__name__, str(error)]))
    checkpoints.close()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
