"""Killed builds resume and end the same; several processes; one directory has one maker."""

from __future__ import annotations

import io
import json
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from glm_jax.data.corpora.build import WorkerDied, Workers
from glm_jax.errors import UserError
from glm_jax.signals import ENDING

SCRIPT = Path(__file__).parent / "build_until.py"


@pytest.fixture(scope="module")
def corpora(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpora")
    draw = random.Random(0)
    words = ["array", "shape", "value", "index", "axis", "scalar", "matrix", "norm", "mean", "return", "input"]
    characters = "天下大势分久必合周末七国争并入于秦及灭之后楚汉又自高祖"
    for number in range(4):
        texts = [" ".join(draw.choices(words, k=60)) for _ in range(12)]
        lines = [json.dumps({"text": text}) for text in [*texts, texts[0]]] + ["broken"]
        (folder / f"{number}.jsonl").write_text("\n".join(lines))
        texts = ["".join(draw.choices(characters, k=100)) for _ in range(12)]
        (folder / f"{number}.txt").write_text("\n\n".join(texts), "utf-8")
    return folder


def build(corpora: Path, folder: Path, *, workers: int = 1, commits: int = 0, until: str = "") -> int:
    """Run the script on links to the corpora, kill it once the cache holds `until`, and return its exit code."""
    folder.mkdir(exist_ok=True)
    for path in corpora.iterdir():
        if not (folder / path.name).exists():
            os.link(path, folder / path.name)
    arguments = [str(folder), str(workers), str(commits), until]
    with subprocess.Popen([sys.executable, str(SCRIPT), *arguments], stdout=subprocess.DEVNULL) as process:
        while until and process.poll() is None:
            if list((folder / "cache").glob(until)):
                process.kill()
            time.sleep(0.002)
        return process.wait()


def content(folder: Path) -> dict[str, bytes]:
    """Return every file that a build leaves, with its own folder's path masked."""
    return {
        str(path.relative_to(folder / "cache")): path.read_bytes().replace(str(folder).encode(), b"FOLDER")
        for stage in ("documents", "tokenizers", "shards")
        for path in (folder / "cache" / stage).rglob("*")
        if path.is_file() and not path.name.startswith("digests-")  # of files that name the folder
    }


@pytest.fixture(scope="module")
def uninterrupted(corpora: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    assert build(corpora, folder) == 0
    files = content(folder)
    assert len({name for name in files if name.endswith("train.array_record")}) > 4
    index = json.loads(next(data for name, data in files.items() if name.endswith("index.json") and b"broken" in data))
    assert index["skipped"]["broken JSON"]["count"] == 4 and index["dropped"]["exact"] == 4
    return files


@pytest.mark.slow
def test_a_build_killed_again_and_again_ends_byte_identical(
    corpora: Path, uninterrupted: dict[str, bytes], tmp_path: Path
):
    draw = random.Random(1)
    codes = []
    while not codes or codes[-1]:
        assert codes.count(-signal.SIGKILL) < 20
        codes.append(build(corpora, tmp_path / "run", commits=draw.randrange(6, 16)))
    assert codes.count(-signal.SIGKILL) > 3
    assert content(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_with_workers_and_killed_while_they_work(corpora: Path, uninterrupted: dict[str, bytes], tmp_path: Path):
    for until in ("documents/.*.building/read/000001", "shards/.*.building/.part-*"):
        assert build(corpora, tmp_path / "run", workers=2, until=until) == -signal.SIGKILL
    assert build(corpora, tmp_path / "run", workers=2) == 0
    assert content(tmp_path / "run") == uninterrupted


@pytest.mark.slow
def test_two_builds_in_one_cache_at_once(corpora: Path, uninterrupted: dict[str, bytes], tmp_path: Path):
    codes: list[int] = []
    build(corpora, tmp_path / "run", until="documents")  # link the texts
    threads = [threading.Thread(target=lambda: codes.append(build(corpora, tmp_path / "run"))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert codes == [0, 0] and content(tmp_path / "run") == uninterrupted


# Workers


def square(number: int) -> int:
    if number < 0:
        raise UserError(f"{number} is negative")
    if number > 100:
        os.kill(os.getpid(), signal.SIGKILL)
    return number * number


def end(number: int) -> int:
    os.kill(os.getpid(), number)
    return number


def fail_or_take_long(path: Path | None) -> None:
    if path is None:
        raise TypeError("no path")
    time.sleep(60)
    path.touch()


@pytest.mark.slow
def test_workers_give_results_in_order_and_the_first_error():
    with Workers(2) as workers:
        assert workers.run("square", square, [3, 1, 2], [1, 1, 1]) == [9, 1, 4]
        with pytest.raises(UserError, match="-1 is negative"):
            workers.run("square", square, [3, -1, -2], [1, 1, 1])
        with pytest.raises(WorkerDied, match="with fewer --workers"):
            workers.run("square", square, [1, 101], [1, 1])
        assert workers.run("square", square, [3, 1], [1, 1]) == [9, 1]
        # Signals to all processes of a command, as a terminal's Ctrl-C, are the main one's to obey.
        assert workers.run("end", end, list(ENDING), [1] * len(ENDING)) == list(ENDING)
    with Workers(1) as workers, pytest.raises(UserError, match="-1 is negative"):
        workers.run("square", square, [3, -1, -2], [1, 1, 1])


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_is_shown_on_a_terminal_alone(terminal: bool, monkeypatch: pytest.MonkeyPatch):
    stream = io.StringIO()
    monkeypatch.setattr(stream, "isatty", lambda: terminal, raising=False)
    monkeypatch.setattr(sys, "stderr", stream)
    with Workers(1) as workers:
        workers.run("read it", square, [1, 2], [3_000_000, 1_000_000])
    assert ("read it:   0%" in stream.getvalue() and "/4.00M" in stream.getvalue()) == terminal
    assert terminal or not stream.getvalue()


def test_an_error_does_not_wait_for_the_other_workers(tmp_path: Path):
    with Workers(2) as workers, pytest.raises(TypeError, match="no path"):
        workers.run("wait", fail_or_take_long, [None, tmp_path / "waited"], [1, 1])
    assert not (tmp_path / "waited").exists()
