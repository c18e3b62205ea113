"""One run at a time in a workdir."""

from pathlib import Path

import pytest

from glm_jax.errors import UserError
from glm_jax.workdir import folder as workdir


def test_a_second_run_in_a_workdir_is_refused_while_the_first_lasts(tmp_path: Path) -> None:
    folder = tmp_path / "new"
    second = workdir.lock(folder)
    with workdir.lock(folder), pytest.raises(UserError, match="another run is using"):
        second.__enter__()
    with workdir.lock(folder):
        assert list(folder.iterdir()) == []


def test_a_workdir_that_cannot_be_written_is_refused_before_anything_is_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").touch()
    for path, words in ((tmp_path / "file/run", "is a file, name a directory"), (tmp_path / ("x" * 300), "too long")):
        with pytest.raises(UserError, match=words):
            workdir.check_writable(path)
    monkeypatch.setattr("os.access", lambda *_: False)  # the tests may be root's, who may write anywhere
    with pytest.raises(UserError, match="cannot be written to, name another"):
        workdir.check_writable(tmp_path / "new/run")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
