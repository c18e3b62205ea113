"""A checkpoint is the same whatever mesh wrote it, and restores bit for bit under any other."""

import errno
import json
import logging
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import pytest

from glm_jax.workdir import checkpoint_folders
from glm_jax.workdir.checkpoints import Checkpoints
from tests.patience import HANG


@pytest.mark.slow
def test_checkpoints_move_between_meshes_and_another_shape_is_named(tmp_path: Path) -> None:
    script = Path(__file__).parent / "checkpoint_cases.py"
    done = subprocess.run(
        [sys.executable, "-W", "error", str(script), str(tmp_path)], capture_output=True, text=True, timeout=HANG
    )
    assert done.returncode == 0, done.stderr[-4000:]
    kind, message = json.loads(done.stdout)
    assert kind == "UserError" and message == (
        f"{tmp_path}/1x1x1/checkpoints/5 does not fit this config: params/blocks/feedforward/down/kernel is "
        "float32 [7, 48, 32], this config wants float32 [7, 64, 32]: set the config back, or name another --workdir"
    )


@pytest.mark.parametrize(("processes", "fails", "waits"), [(1, False, 1), (1, True, 1), (2, False, 1), (2, True, 0)])
def test_closing_waits_unless_others_may_be_gone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, processes: int, fails: bool, waits: int
) -> None:
    checkpoints, waited = Checkpoints(tmp_path), []
    monkeypatch.setattr(checkpoints, "_settle", lambda: waited.append("settled"))
    monkeypatch.setattr(jax, "process_count", lambda: processes)
    try:
        if fails:
            raise RuntimeError("the run fails")
        checkpoints.close()
    except RuntimeError:
        checkpoints.close()
    assert len(waited) == waits


def test_what_the_disk_refused_is_not_logged_and_all_else_is(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    Checkpoints(tmp_path)
    log = logging.getLogger("asyncio")
    log.error("said")
    for error in (OSError(errno.ENOSPC, "No space left on device"), ValueError("something else")):
        try:
            raise error
        except (OSError, ValueError):
            log.exception("a task has failed")
    assert [(record.getMessage(), record.exc_info and record.exc_info[0]) for record in caplog.records] == [
        ("said", None), ("a task has failed", ValueError)
    ]  # fmt: skip


@pytest.mark.parametrize("late", [0, 2])
def test_a_folder_that_is_still_written_to_is_removed_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, late: int
) -> None:
    folder, calls, remove = tmp_path / "1.tmp", [], shutil.rmtree

    def interfere(path: Path, **options: Any) -> None:
        remove(path, **options)
        calls.append(path)
        if len(calls) <= late:
            folder.mkdir()  # like a thread that had a file to write

    folder.mkdir()
    monkeypatch.setattr(shutil, "rmtree", interfere)
    checkpoint_folders.remove(folder)
    assert calls == [folder] * (late + 1) and not folder.exists()


@pytest.mark.slow
def test_two_processes_save_together_and_agree_on_what_is_good(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    command = [sys.executable, "-W", "error", "-m", "tests.workdir.checkpoint_processes", port]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "1"}
    environment["JAX_ENABLE_COMPILATION_CACHE"] = "0"  # one process may write small files only
    running = [
        subprocess.Popen(
            [*command, str(index), str(tmp_path)], cwd=Path(__file__).parents[2],
            stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment,
        )
        for index in range(2)
    ]  # fmt: skip
    first, second = (process.communicate(timeout=HANG) for process in running)
    assert [process.returncode for process in running] == [0, 0], first[1][-4000:] + second[1][-4000:]
    reasons = "another process could not write its part", "File too large"
    for (output, _), reason in zip((first, second), reasons, strict=True):
        assert json.loads(output.splitlines()[-1]) == {  # gloo prints, too
            "saved": [1, [1], [[1, None]], ["1"]],
            "refused": [1, [1], [[2, reason]], ["1"]],
            "saved again": [3, [1, 3], [[3, None]], ["1", "3"]],
            "damaged": [1, [1], [], ["1", "3.damaged"]],
            "said": [
                f"checkpoint 2 could not be saved ({reason}): the run continues, the newest is still that of step 1",
                "checkpoint 3 is skipped: params/manifest.ocdbt is cut short",
            ],
        }
