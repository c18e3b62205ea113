"""What a process sets before it loads jax, each case in a process of its own."""

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from glm_jax import startup

PROGRAM = """
from glm_jax import startup
startup.keep_programs()
import jax
hits = []
jax.monitoring.register_event_listener(lambda name, **_: hits.append(name) if name.endswith("cache_hits") else None)
print(float(jax.jit(lambda x: 2 * x)(3.0)), len(hits), jax.config.jax_compilation_cache_dir)
"""
MEMORY = """
import resource, sys, threading
import numpy as np
from glm_jax import startup
print(startup.keep_memory())
def work():
    np.ones(2**27)  # 1 GB, in an arena that is not the main thread's
faults = []
for _ in range(3):
    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    faults.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt)
print(faults[2] - faults[1])
"""


def run(program: str, **environment: str) -> list[str]:
    """Run a program without settings of ours or jax's; return the words that it prints, and check that it is silent."""
    bare = {name: value for name, value in os.environ.items() if not name.startswith(("JAX_", "GLM_JAX_", "GLIBC"))}
    done = subprocess.run(
        [sys.executable, "-c", program], env={**bare, "JAX_PLATFORMS": "cpu", **environment}, capture_output=True,
        text=True, check=True,
    )  # fmt: skip
    assert not done.stderr
    return done.stdout.split()


def entries(cache: Path) -> list[Path]:
    return sorted((cache / "glm_jax" / "compiled").rglob("*-cache"))


@pytest.mark.slow
def test_programs_are_kept_in_the_users_cache_and_damaged_ones_replaced(tmp_path: Path) -> None:
    first = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
    kept = entries(tmp_path)
    assert first[:2] == ["6.0", "0"] and kept and kept[0].parent == Path(first[2])
    second = run(PROGRAM, XDG_CACHE_HOME=str(tmp_path))
    assert second[0] == "6.0" and int(second[1]) == len(kept)
    whole = {path: path.read_bytes() for path in kept}
    for path, content in whole.items():
        path.write_bytes(content[: len(content) // 2])  # as if its writer had been killed
    assert run(PROGRAM, XDG_CACHE_HOME=str(tmp_path))[:2] == ["6.0", "0"]
    assert entries(tmp_path) == kept and all(path.stat().st_size > len(whole[path]) / 2 for path in kept)
    assert run(PROGRAM, XDG_CACHE_HOME=str(tmp_path))[:2] == second[:2]


@pytest.mark.slow
def test_a_cache_that_cannot_be_used_costs_nothing_but_time(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert run(PROGRAM, XDG_CACHE_HOME=str(tmp_path / "file"))[:2] == ["6.0", "0"]
    assert run(PROGRAM, XDG_CACHE_HOME="", HOME="/proc/nowhere")[:2] == ["6.0", "0"]


@pytest.mark.slow
def test_the_environment_decides(tmp_path: Path) -> None:
    named = str(tmp_path / "named")
    assert run(PROGRAM, XDG_CACHE_HOME=str(tmp_path), JAX_COMPILATION_CACHE_DIR=named)[2] == named
    run(PROGRAM, XDG_CACHE_HOME=str(tmp_path), JAX_ENABLE_COMPILATION_CACHE="0")
    assert not entries(tmp_path)


def test_the_programs_that_were_not_used_for_longest_are_removed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for number, (used, written) in enumerate([(5, 1), (2, 2), (1, 4), (3, 3)]):
        path = tmp_path / f"{number}-cache"
        path.write_bytes(bytes(10))
        os.utime(path, (used, written))
    (tmp_path / "other").write_bytes(bytes(100))
    monkeypatch.setattr(startup, "KEPT_BYTES", 25)
    startup._prune(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-cache", "2-cache", "other"]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_used_again() -> None:
    pages = 2**30 // os.sysconf("SC_PAGE_SIZE")
    done, faults = run(MEMORY)
    assert done == "True" and int(faults) < pages / 1000
    for switch in ({"GLM_JAX_FREE_MEMORY": "1"}, {"GLIBC_TUNABLES": "glibc.malloc.arena_max=8"}):
        done, faults = run(MEMORY, **switch)
        assert done == "False" and int(faults) > 100  # huge pages make it few
