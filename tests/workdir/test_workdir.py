"""One run at a time in a workdir."""

from pathlib import Path

import pytest

from glm_jax.config import default_config, resolve, with_changes
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
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


def test_a_tokenizer_is_known_by_its_content_and_not_by_its_path(tmp_path: Path) -> None:
    one, other = (
        SentencePieceTokenizer(train([f"the small array returns {word} " * 30], 300))
        for word in ("a shape", "no shape")
    )
    changes = {"data.sources": {"en": {"path": "en.txt"}}}
    config = with_changes(resolve(default_config()), changes)
    workdir.write(tmp_path, config, one)
    for path in ("copy/of.model", str(tmp_path / "tokenizer.model")):
        moved = with_changes(config, {"data.tokenizer.path": path})
        workdir.check(tmp_path, moved)
    workdir.check_tokenizer(tmp_path, SentencePieceTokenizer(one.model))
    with pytest.raises(UserError, match="is not the tokenizer of these sources"):
        workdir.check_tokenizer(tmp_path, other)
    with pytest.raises(UserError, match=r"data\.tokenizer\.vocab_size=8000"):
        workdir.check(tmp_path, with_changes(config, {"data.tokenizer.vocab_size": 300}))
