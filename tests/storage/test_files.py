"""What is written survives a crash: content is synced to the disk before its name, and its name before it is used."""

import os
import stat
from pathlib import Path

import pytest

from glm_jax.storage.files import atomic_directory, json_line, open_atomic, write_atomic
from tests.journal import Journal


@pytest.fixture
def journal(monkeypatch: pytest.MonkeyPatch) -> Journal:
    return Journal(monkeypatch)


@pytest.mark.parametrize("content", ["text 话", b"bytes"])
def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: Journal, content: str | bytes) -> None:
    path = tmp_path / "new" / "folder" / "file.json"
    write_atomic(path, content)
    assert path.read_bytes() == (content.encode() if isinstance(content, str) else content)
    ((source, target, safe),) = journal.renamed
    assert (source.parent, target, safe) == (path.parent, path, True)
    assert journal.is_safe(path.parent)  # the name too, once it is there
    assert stat.S_IMODE(path.stat().st_mode) == 0o644 and os.listdir(path.parent) == [path.name]


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path, journal: Journal) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"old")
    with pytest.raises(KeyboardInterrupt), open_atomic(path) as file:
        file.write(b"half")
        raise KeyboardInterrupt
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["file"] and not journal.renamed
    with open_atomic(path) as file:
        file.write(b"new content")
        file.seek(4)
        assert file.read() == b"content" and path.read_bytes() == b"old"
    assert path.read_bytes() == b"new content" and journal.renamed[0][2]


def test_a_folder_and_all_in_it_is_on_the_disk_before_it_has_its_name(tmp_path: Path, journal: Journal) -> None:
    path = tmp_path / "cache" / "corpus"
    with atomic_directory(path) as folder:
        (folder / "deep" / "er").mkdir(parents=True)
        (folder / "top").write_bytes(b"0123")
        (folder / "deep" / "er" / "file").write_bytes(b"01234567")
        assert folder.parent == path.parent and not path.exists()
    assert (path / "deep" / "er" / "file").read_bytes() == b"01234567" and (path / "top").read_bytes() == b"0123"
    assert journal.renamed == [(folder, path, True)]
    assert journal.is_safe(path.parent)
    assert stat.S_IMODE(path.stat().st_mode) == 0o755 and os.listdir(path.parent) == [path.name]


def test_a_folder_that_fails_or_comes_second_leaves_what_was_there(tmp_path: Path) -> None:
    path = tmp_path / "corpus"
    with pytest.raises(KeyboardInterrupt), atomic_directory(path) as folder:
        (folder / "half").write_bytes(b"")
        raise KeyboardInterrupt
    assert os.listdir(tmp_path) == []
    with atomic_directory(path) as folder:
        (folder / "ours").write_bytes(b"")
        path.mkdir()
        (path / "theirs").write_bytes(b"")
    assert os.listdir(path) == ["theirs"] and os.listdir(tmp_path) == ["corpus"]
    (tmp_path / "file").write_bytes(b"not a folder")
    with pytest.raises(OSError), atomic_directory(tmp_path / "file"):
        pass
    assert (tmp_path / "file").read_bytes() == b"not a folder" and sorted(os.listdir(tmp_path)) == ["corpus", "file"]


def test_a_line_of_json_is_json() -> None:
    values = {"a": float("nan"), "b": [1.5, float("-inf"), (float("inf"), 2)], "c": {"d": float("nan"), "e": "nan"}}
    assert json_line(values) == '{"a": null, "b": [1.5, null, [null, 2]], "c": {"d": null, "e": "nan"}}\n'
