"""Save until a small disk is full, and again after room is made; test_checkpoint_damage.py runs this.

`full_disk_cases.py DIRECTORY` mounts a disk of a few megabytes there. Where that is not allowed, it limits the size of
files instead, so that the kernel refuses a write in the middle of a save just the same.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np

from glm_jax.engine.bind import EngineConfig
from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh
from glm_jax.training.optimizer import OptimizerConfig
from glm_jax.training.state import StepConfig, create_state, disk_targets, to_disk
from glm_jax.workdir.checkpoints import Checkpoints

CONFIG = StepConfig(EngineConfig(GLMConfig(2, 64, 2, 64, 512, max_length=8), 512, 4), OptimizerConfig(), None, seed=3)
MESH = mesh.build(dict.fromkeys(mesh.AXES, 1))


def mounted(directory: Path) -> bool:
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(directory)]
    with contextlib.suppress(FileNotFoundError):
        return subprocess.run(command, stderr=subprocess.DEVNULL).returncode == 0
    return False


def free(directory: Path) -> int:
    numbers = os.statvfs(directory)
    return numbers.f_bavail * numbers.f_frsize


@contextlib.contextmanager
def full(directory: Path, mounted: bool, room: int) -> Iterator[int]:
    """Leave `room` bytes on the disk, or for each file; yield the number of the error that follows."""
    if mounted:
        filler = directory / "filler"
        filler.write_bytes(bytes(free(directory) - room))
        yield errno.ENOSPC
        filler.unlink()
    else:
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
        yield errno.EFBIG
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def main(directory: Path) -> None:
    small_disk = mounted(directory)
    state, said = create_state(CONFIG, MESH), []
    checkpoints = Checkpoints(directory / "run", say=said.append)
    checkpoints.save(to_disk(CONFIG, MESH, state), {"step": 1})
    assert checkpoints.restore(disk_targets(CONFIG, MESH)) is not None  # waits for the save
    events = checkpoints.events()
    size, before = events[0]["bytes"], free(directory)
    for step, room in ((2, 0), (3, size // 3)):
        with full(directory, small_disk, room) as number:
            checkpoints.save(to_disk(CONFIG, MESH, state), {"step": step})
            restored = checkpoints.restore(disk_targets(CONFIG, MESH))
            assert restored is not None and restored.run["step"] == 1
        unsaved = checkpoints.unsaved()
        assert os.listdir(directory / "run/checkpoints") == ["1"]
        assert not small_disk or free(directory) == before, "the partial folder still takes up room"
    checkpoints.save(to_disk(CONFIG, MESH, state), {"step": 4})
    checkpoints.close()
    assert checkpoints.steps() == [1, 4] and checkpoints.unsaved() is None
    restored = Checkpoints(directory / "run").restore(disk_targets(CONFIG, MESH))
    assert restored is not None and restored.run["step"] == 4
    jax.tree.map(np.testing.assert_array_equal, restored.items["params"], state.params)
    events += checkpoints.events()
    print(json.dumps({"reason": os.strerror(number), "said": said, "events": events, "unsaved": unsaved}))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
