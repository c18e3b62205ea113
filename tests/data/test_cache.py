"""The cache: stages appear whole, damage is named and made again, and whatever the system refuses is one line."""

from __future__ import annotations

import errno
import json
import os
import pwd
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from texts import ENGLISH

from glm_jax.config import default_config, instructions, resolve, source
from glm_jax.data.corpora import cache as caches
from glm_jax.data.corpora import prepare, samples
from glm_jax.data.corpora.build import WorkerDied
from glm_jax.data.corpora.cache import Cache, cache_directory
from glm_jax.errors import UserError
from glm_jax.storage.files import atomic_directory
from tests.damage import empty, flip


def nothing(building: Path) -> None:
    pass


def test_made(tmp_path: Path):
    cache, calls = Cache(tmp_path, print), []

    def make(building: Path) -> None:
        calls.append(sorted(path.name for path in building.iterdir()))
        with atomic_directory(building / "piece"):
            pass
        if len(calls) == 1:
            raise WorkerDied("killed")
        if len(calls) == 3:
            (building / ".left").touch()

    directory = tmp_path / "stage" / "key"
    with pytest.raises(WorkerDied):
        cache.made("stage", "key", make)
    assert not directory.exists()
    leftover = tmp_path / "stage" / ".key.building" / ".piece.abc"
    leftover.mkdir()
    assert cache.made("stage", "key", make) == (directory, False)
    assert cache.made("stage", "key", make) == (directory, True)
    assert calls == [[], ["piece"]]  # finished pieces are kept, unfinished ones are gone
    other, _ = cache.made("stage", "other", make)
    assert sorted(path.name for path in other.iterdir()) == ["digests-0-of-1.json", "piece"]


def test_a_mistake_leaves_nothing(tmp_path: Path):
    def make(building: Path) -> None:
        (building / "piece").touch()
        raise UserError("wrong")

    with pytest.raises(UserError, match="^wrong"):
        Cache(tmp_path, print).made("stage", "key", make)
    assert list((tmp_path / "stage").iterdir()) == []


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "no room for .*key .No space left on device.: make room"),
        (errno.EDQUOT, "no room for .*key .*: make room"),
        (errno.EROFS, "stage/key cannot be used to make .*key .Read-only file system.: .*or set data.cache"),
        (errno.EACCES, "stage/key cannot be used to make .*key .Permission denied.: .*or set data.cache"),
    ],
)
def test_what_the_disk_refuses_is_one_line_and_costs_nothing(tmp_path: Path, number: int, message: str):
    cache = Cache(tmp_path, print)

    def make(building: Path) -> None:
        if (building / "piece").exists():
            return
        (building / "piece").touch()
        raise OSError(number, os.strerror(number))

    with pytest.raises(UserError, match=message):
        cache.made("stage", "key", make)
    directory, _ = cache.made("stage", "key", make)
    assert (directory / "piece").exists()


def test_two_at_once_make_one_and_mend_it_once(tmp_path: Path):
    made_by: list[int] = []
    lines: list[str] = []

    def make(building: Path) -> None:
        time.sleep(0.1)
        made_by.append(threading.get_ident())
        (building / "piece").write_text("whole")

    for count in (1, 2):
        arguments = ("stage", "key", make)
        threads = [threading.Thread(target=Cache(tmp_path, lines.append).made, args=arguments) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(made_by) == count == len(lines) + 1
        assert (tmp_path / "stage" / "key" / "piece").read_text() == "whole"
        (tmp_path / "stage" / "key" / "piece").write_text("torn!")


def test_a_stage_that_cannot_be_made_again_is_refused_and_kept(tmp_path: Path):
    cache = Cache(tmp_path, print)

    def gone(building: Path) -> None:
        raise samples.Unreachable("no network")

    directory, _ = cache.made("text", "key", lambda building: (building / "texts").touch())
    (directory / "texts").write_text("changed")
    with pytest.raises(UserError, match="key is damaged .texts differs.* and cannot be made again: no net") as caught:
        cache.made("text", "key", gone)
    assert not isinstance(caught.value, samples.Unreachable)  # which would leave the source out
    assert (directory / "texts").read_text() == "changed"


def test_cache_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_directory("") == tmp_path / "xdg" / "glm_jax"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert cache_directory("") == tmp_path / "home" / ".cache" / "glm_jax"
    assert cache_directory(f"{tmp_path}{os.sep}here") == tmp_path / "here"
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot make the cache .*file/below .*: set data\.cache"):
        cache_directory(str(tmp_path / "file" / "below"))
    monkeypatch.setattr(os, "access", lambda path, mode: False)  # root may write anywhere
    with pytest.raises(UserError, match=r"cannot write to the cache .*here: set data\.cache"):
        cache_directory(str(tmp_path / "here"))


def test_without_a_home_the_cache_must_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def unknown(user: object) -> None:
        raise KeyError(user)

    for name in ("HOME", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", unknown)
    assert cache_directory(str(tmp_path)) == tmp_path
    for configured in ("", "~/cache", "~nobody_of_this_name/cache"):
        with pytest.raises(UserError, match="has no home directory to be in: set data.cache, or HOME"):
            cache_directory(configured)


# Damage to a whole cache


def cut(path: Path) -> None:
    os.truncate(path, max(0, path.stat().st_size - 1))


def prepared_rows(folder: Path, cache: Path, report: Callable[[str], None]) -> dict[str, list[list[int]]]:
    """Prepare a small config and return all its documents as ids, by source and split or by set of instructions."""
    config = default_config()
    data: Any = config.data
    data.cache, data.tokenizer.vocab_size, data.heldout = str(cache), 400, 0.2
    data.sources = {"sample": source(sample="made-up")}
    data.instructions = {"sums": instructions(path=str(folder / "sums.jsonl"))}
    found = prepare.prepare(resolve(config), report)
    documents: dict[str, Any] = {
        f"{name}/{side}": found.shards[name][side] for name in found.shards for side in ("train", "heldout")
    }
    documents |= {name: sides.train for name, sides in found.instructions.items()}
    return {name: [own[row].tolist() for row in range(len(own))] for name, own in documents.items()}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("small")
    (folder / "sums.jsonl").write_text(json.dumps({"text": "1+1=", "target": "2"}) + "\n", "utf-8")
    return folder


@pytest.fixture
def a_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)  # no crash is tested here, and many files are written
    sample = samples.Sample(lambda: {"version": "1"}, lambda: "nowhere", lambda: iter(ENGLISH[:12]))
    monkeypatch.setitem(samples.SAMPLES, "made-up", sample)


@pytest.fixture(scope="module")
def whole(small: Path) -> Path:
    return small / "cache"


@pytest.mark.slow
@pytest.mark.usefixtures("a_sample")
def test_content_is_compared_by_verify_and_every_so_often(
    small: Path, whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    lines: list[str] = []
    rows = prepared_rows(small, whole, lines.append)
    copy = shutil.copytree(whole, tmp_path / "copy")
    documents = next((copy / "documents").rglob("documents.jsonl"))
    before = documents.stat()
    flip(documents)
    os.utime(documents, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a disk that forgets, not a user who edits
    decayed = shutil.copytree(copy, tmp_path / "decayed")
    lines.clear()
    assert prepared_rows(small, copy, lines.append) == rows and not any("damaged" in line for line in lines)
    with pytest.raises(UserError, match="^1 of 5 stages in .*copy are damaged: `glm-jax corpus build`"):
        Cache(copy, lines.append).verify()
    assert lines[-2].startswith(str(documents.parents[1])) and "documents.jsonl differs from its digest" in lines[-2]
    lines.clear()
    prepared_rows(small, copy, lines.append)
    assert sum("is damaged" in line for line in lines) == 1
    Cache(copy, lines.append).verify()
    assert lines[-1].endswith(" 0 damaged")
    monkeypatch.setattr(caches, "COMPARE_EVERY", int((decayed / "runs").read_text()) + 2)
    for damaged in (0, 1, 0):
        lines.clear()
        assert prepared_rows(small, decayed, lines.append) == rows
        assert sum("is damaged" in line for line in lines) == damaged


@pytest.mark.slow
@pytest.mark.usefixtures("a_sample")
@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_damage_to_any_file_is_named_and_mended(
    small: Path, whole: Path, tmp_path: Path, damage: Callable[[Path], None]
):
    lines: list[str] = []
    rows = prepared_rows(small, whole, lines.append)
    assert not any("damaged" in line for line in lines)
    names = sorted(path.relative_to(whole) for path in whole.rglob("*") if path.is_file())
    assert {name.parts[0] for name in names} == {*caches.STAGES, "checked", "locks", "runs"} - {"tasks"}
    kinds = {name if name.parts[0] in caches.STAGES else name.parts[0]: name for name in names}
    for name in kinds.values():  # every file of a stage, and one of each other kind
        copy = shutil.copytree(whole, tmp_path / "copy")
        damage(copy / name)
        lines.clear()
        assert prepared_rows(small, copy, lines.append) == rows, name
        damaged = [line for line in lines if "damaged" in line]
        changed = name.parts[0] in caches.STAGES and ((whole / name).stat().st_size or damage is Path.unlink)
        assert len(damaged) == bool(changed), (name, damaged)
        assert not changed or damaged[0].startswith(f"{copy / name.parts[0] / name.parts[1]} is damaged ("), name
        made = [line for line in lines if " in 0." in line or "(fetched" in line]
        assert len(made) <= 1, (name, made)  # nothing but the damaged stage is made again
        Cache(copy, print).verify()
        shutil.rmtree(copy)
