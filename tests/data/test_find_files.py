"""Which files a path names, and what is said of the others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from glm_jax.data.corpora.files import find_files
from glm_jax.errors import UserError


def make(folder: Path, *names: str) -> None:
    for name in names:
        (folder / name).parent.mkdir(exist_ok=True, parents=True)
        (folder / name).write_text(name)


def found(path: Path) -> list[Path]:
    return list(find_files(str(path)).files)


def test_a_file_a_folder_and_globs(tmp_path: Path):
    make(tmp_path, "b.txt", "a.txt", "deep/c.txt", "deep/.hidden.txt", ".git/d.txt")
    everything = [tmp_path / name for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert found(tmp_path) == everything == found(tmp_path / "**") == found(tmp_path / "**" / "*.t?t")
    assert found(tmp_path / "*.txt") == everything[:2] == found(tmp_path / "[ab].txt")
    assert found(tmp_path / "**" / "c.txt") == found(tmp_path / "d*" / "c.txt") == everything[2:]
    assert found(tmp_path / "a.txt") == everything[:1]
    assert found(tmp_path / ".git") == [tmp_path / ".git/d.txt"] == found(tmp_path / ".g*" / "*")
    for missing in ("missing", "*.json", "[ab].json", "missing/**"):
        with pytest.raises(UserError, match="does not exist: give a file, a directory or a glob"):
            find_files(str(tmp_path / missing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a directory without files"):
        find_files(str(tmp_path / "empty"))


def test_a_relative_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, "deep/c.txt")
    monkeypatch.chdir(tmp_path)
    assert found(Path("deep")) == [Path("deep/c.txt")] == found(Path("d*/*")) == found(Path(".")) == found(Path("**"))


def test_brackets_are_first_taken_literally(tmp_path: Path):
    make(tmp_path, "part[1]/a[2].txt", "part1/a2.txt")
    assert found(tmp_path / "part[1]") == [tmp_path / "part[1]/a[2].txt"] == found(tmp_path / "part[1]" / "*.txt")
    assert found(tmp_path / "part[1]/a[2].txt") == [tmp_path / "part[1]/a[2].txt"]
    assert found(tmp_path / "part?" / "*") == [tmp_path / "part1/a2.txt"]


def test_links_are_followed_and_circles_end(tmp_path: Path):
    make(tmp_path, "elsewhere/far.txt", "corpus/near.txt", "corpus/inner/deep.txt")
    corpus = tmp_path / "corpus"
    (corpus / "link").symlink_to(tmp_path / "elsewhere")
    (corpus / "again.txt").symlink_to(corpus / "near.txt")
    for folder in (corpus, corpus / "inner"):  # two circles in each: a walk that took every way would not end
        for number in range(2):
            (folder / f"circle{number}").symlink_to(corpus)
    for path in (corpus, corpus / "**", corpus / "**" / "*.txt"):
        files = found(path)
        assert len(files) == 3 and {file.read_text() for file in files} == {
            "elsewhere/far.txt", "corpus/near.txt", "corpus/inner/deep.txt"
        }  # fmt: skip
    assert found(corpus) == found(corpus / "**" / "*.txt") == sorted(found(corpus))


def test_what_is_not_read_is_accounted_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    make(tmp_path, "good.txt", "locked/x.txt", ".DS_Store", "sub/.git/x", "sub/y.txt")
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "itself").symlink_to(tmp_path / "itself")
    os.mkfifo(tmp_path / "pipe")
    listed = os.listdir

    def refuse(folder: str | Path) -> list[str]:  # tests may run as root, who may read everything
        if Path(folder).name == "locked":
            raise PermissionError(13, "Permission denied")
        return listed(folder)

    monkeypatch.setattr(os, "listdir", refuse)
    result = find_files(str(tmp_path))
    assert list(result.files) == [tmp_path / "good.txt", tmp_path / "sub/y.txt"]
    assert [(file.name, damage.reason, damage.message.split(":")[0]) for file, damage in result.skipped] == [
        ("dangling", "dangling link", f"a link to {tmp_path}/nowhere, which is not there"),
        ("itself", "dangling link", f"a link to {tmp_path}/itself, which is not there"),
        ("locked", "unreadable file", "cannot be read (permission denied)"),
        ("pipe", "unreadable file", "cannot be read (not a regular file)"),
    ]
    assert result.left_out == (tmp_path / ".DS_Store", tmp_path / "sub/.git")
    assert result == find_files(str(tmp_path / "**" / "*"))
    assert tmp_path / "sub" in find_files(str(tmp_path / "*")).left_out
    with pytest.raises(UserError, match=r"/dangling: a link to .*/nowhere, which is not there: fix or remove it$"):
        result.check()
    with pytest.raises(UserError, match=r"corpus .*/pipe has no file that can be read: .*\(not a regular file\)"):
        find_files(str(tmp_path / "pipe"))
    with pytest.raises(UserError, match=r"^instructions .*/pipe has no file that can be read"):
        find_files(str(tmp_path / "pipe"), "instructions")
    with pytest.raises(UserError, match=r"corpus /dev/zero has no file that can be read"):
        find_files("/dev/zero")
