"""One of two processes that save and restore together; test_checkpoint.py runs both.

`python -m tests.workdir.checkpoint_processes PORT INDEX WORKDIR` prints, as JSON, what this process was told and what
it restored. Each is a stage of a pipeline; of three layers they hold two and one, which change hands on the way to the
disk and back.
"""

import json
import os
import resource
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np

from glm_jax.engine.bind import EngineConfig
from glm_jax.model import GLMConfig
from glm_jax.parallel import processes
from glm_jax.parallel.mesh import build
from glm_jax.storage import digests
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.state import StepConfig, create_state, disk_targets, from_disk, to_disk
from glm_jax.workdir.checkpoints import Checkpoints
from tests.parallel.together import whole

CONFIG = StepConfig(EngineConfig(GLMConfig(3, 32, 2, 32, 64, max_length=8), 64, 4), OptimizerConfig(), None, seed=3)

PORT, INDEX, WORKDIR = sys.argv[1], int(sys.argv[2]), sys.argv[3]


def outcome(checkpoints: Checkpoints, mesh: jax.sharding.Mesh, expected: Any) -> list[Any]:
    """Restore the newest good checkpoint; return its step and what this process and both together see."""
    restored = checkpoints.restore(disk_targets(CONFIG, mesh))
    assert restored is not None
    params = whole(mesh, from_disk(CONFIG, mesh, restored.items).params)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    events = [(event["step"], event.get("error")) for event in checkpoints.events()]
    seen = [restored.run["step"], checkpoints.steps(), events, sorted(os.listdir(checkpoints.directory))]
    processes.wait_for_all()  # the other may begin its next save
    return seen


def main() -> None:
    mesh = build({"data": 1, "pipeline": 2, "tensor": 1})
    state, said = create_state(CONFIG, mesh), []
    expected = whole(mesh, state.params)
    checkpoints = Checkpoints(Path(WORKDIR), say=said.append)
    checkpoints.save(to_disk(CONFIG, mesh, state), {"step": 1})
    told: dict[str, Any] = {"saved": outcome(checkpoints, mesh, expected)}
    folder = checkpoints.directory / "1"
    lists = [json.loads((folder / f"digests-{index}-of-2.json").read_bytes())["files"] for index in range(2)]
    assert sorted([*lists[0], *lists[1]]) == digests.files(folder), "each file must be in one list"
    assert {name.split("/")[1] for name in lists[1]} == {"ocdbt.process_1", "array_metadatas"}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    if INDEX == 1:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50, limits[1]))  # this process's disk is full
    checkpoints.save(to_disk(CONFIG, mesh, state), {"step": 2})
    told["refused"] = outcome(checkpoints, mesh, expected)
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    checkpoints.save(to_disk(CONFIG, mesh, state), {"step": 3})
    told["saved again"] = outcome(checkpoints, mesh, expected)
    if INDEX == 1:
        path = checkpoints.directory / "3/params/manifest.ocdbt"
        path.write_bytes(path.read_bytes()[:-1])
    processes.wait_for_all()
    told["damaged"] = outcome(checkpoints, mesh, expected)
    checkpoints.close()
    print(json.dumps({**told, "said": said}))


if __name__ == "__main__":
    jax.config.update("jax_cpu_collectives_implementation", "gloo")
    jax.distributed.initialize(f"127.0.0.1:{PORT}", 2, INDEX)
    main()
