"""Damage to any byte of a sealed folder is noticed, in the lists of digests, too."""

import json
import os
from pathlib import Path

import pytest

from glm_jax.storage import digests
from tests.journal import Journal

CONTENTS = {"top": b"a" * 10, "deep/er/file": b"", "deep/other": b"0123456789"}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name, content in CONTENTS.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_bytes(content)
    return tmp_path


def test_a_sealed_folder_is_whole_and_knows_its_size(folder: Path) -> None:
    assert digests.damage(folder) == digests.UNFINISHED and not digests.is_sealed(folder)
    digests.seal(folder, digests.files(folder))
    assert digests.damage(folder) is None and digests.is_sealed(folder)
    assert digests.size(folder) == 20 and digests.files(folder) == sorted(CONTENTS)
    assert not digests.is_sealed(folder / "absent")
    assert digests.damage(folder / "absent") == "cannot be read (No such file or directory)"


def test_an_identity_is_that_of_names_and_contents_sealed_or_not(folder: Path) -> None:
    whole, deep = digests.identity(folder), digests.identity(folder, "deep/")
    assert len({whole, deep, digests.identity(folder, "top")}) == 3
    digests.seal(folder, digests.files(folder))
    (folder / "note").write_text("not sealed")
    assert (digests.identity(folder), digests.identity(folder, "deep/")) == (whole, deep)
    (folder / "digests-0-of-1.json").unlink()
    assert digests.identity(folder) != whole
    (folder / "note").unlink()
    (folder / "top").write_bytes(b"b" * 10)
    assert digests.identity(folder) != whole and digests.identity(folder, "deep/") == deep
    (folder / "deep/other").rename(folder / "deep/another")
    assert digests.identity(folder, "deep/") != deep


def test_any_flipped_bit_and_any_cut_is_noticed(folder: Path) -> None:
    digests.seal(folder, digests.files(folder))
    for path in filter(Path.is_file, list(folder.rglob("*"))):
        content = path.read_bytes()
        for bit in range(0, 8 * len(content), 5):  # every byte, all eight places
            spoilt = bytearray(content)
            spoilt[bit // 8] ^= 1 << bit % 8
            path.write_bytes(spoilt)
            damage = digests.damage(folder)
            assert damage is not None and damage.startswith(path.relative_to(folder).as_posix()), (path, bit)
        for length in range(0, len(content), 5):
            path.write_bytes(content[:length])
            assert digests.damage(folder) is not None, (path, length)
        path.write_bytes(content)
        assert digests.damage(folder) is None


def test_damage_is_named(folder: Path) -> None:
    digests.seal(folder, digests.files(folder))
    (folder / "top").write_bytes(b"a" * 9 + b"b")
    assert digests.damage(folder) == "top differs from its digest"
    (folder / "top").write_bytes(b"a" * 11)
    assert digests.damage(folder) == "top differs from its digest"
    (folder / "deep/other").write_bytes(b"0123")
    assert digests.damage(folder) == "deep/other is cut short"
    (folder / "deep/other").unlink()
    assert digests.damage(folder) == "deep/other is missing"
    assert digests.damage(folder, "deep/er/") is None
    assert digests.damage(folder, "elsewhere/") == "holds no elsewhere"
    (folder / "deep/er/file").unlink()
    (folder / "deep/er/file").mkdir()
    assert digests.damage(folder, "deep/er/") == "deep/er/file cannot be read (Is a directory)"


def test_unlisted_files_do_not_matter(folder: Path) -> None:
    digests.seal(folder, digests.files(folder))
    (folder / "deep/note").write_text("kept for the record")
    assert digests.damage(folder) is None


def test_processes_seal_and_verify_their_shares(folder: Path) -> None:
    digests.seal(folder, ["deep/other"], 1, 2)
    assert digests.damage(folder) == "digests-0-of-2.json is missing" and not digests.is_sealed(folder)
    digests.seal(folder, ["deep/er/file", "top"], 0, 2)
    assert digests.damage(folder) is None and digests.size(folder) == 20
    (folder / "deep/other").write_bytes(b"9876543210")
    shares = [digests.damage(folder, "", index, 3) for index in range(3)]
    assert shares == [None, "deep/other differs from its digest", None]


def test_a_changed_list_is_noticed(folder: Path) -> None:
    digests.seal(folder, digests.files(folder))
    path = folder / "digests-0-of-1.json"
    content = json.loads(path.read_bytes())
    del content["files"]["top"]
    path.write_text(json.dumps(content, indent=1) + "\n")
    assert digests.damage(folder) == "digests-0-of-1.json differs from its digest"
    os.truncate(path, 40)
    assert digests.damage(folder) == "digests-0-of-1.json is cut short"


def test_sealed_files_are_on_the_disk_before_their_list(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (folder / "deep/unlisted").write_bytes(b"0")
    journal = Journal(monkeypatch)
    digests.seal(folder, CONTENTS)
    ((_, target, safe),) = journal.renamed
    assert target == folder / "digests-0-of-1.json" and safe
    for path in (folder, folder / "deep", folder / "deep/er", *map(folder.joinpath, [*CONTENTS, target.name])):
        assert journal.is_safe(path), path
    assert not journal.is_safe(folder / "deep/unlisted")
