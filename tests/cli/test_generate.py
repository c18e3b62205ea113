"""`glm-jax generate` with a scripted model: what reaches the terminal."""

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.cli import main
from glm_jax.errors import UserError
from glm_jax.inference import Model, fill


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Any]]:
    """Let every fill be a text with control characters, and return what was asked for."""
    calls: list[tuple[str, Any]] = []

    def answer(cfg: Any, params: Any, tokenizer: Any, prompt: str, **settings: Any) -> list[fill.Piece]:
        calls.append((prompt, settings["sampling"]))
        say: Callable[[str], None] = settings["say"]
        say("fewer tokens")
        return [fill.Piece("a\x1b ", False), fill.Piece("\x1b[2J\x07 中\r\n", True)]

    monkeypatch.setattr(fill, "fill", answer)
    monkeypatch.setattr(Model, "open", lambda workdir: SimpleNamespace(config=0, params=0, tokenizer=0))
    return calls


def test_fills_cannot_command_a_terminal(asked: list[tuple[str, Any]], capsys: pytest.CaptureFixture[str]) -> None:
    assert main.main(["generate", "--workdir=x", "--prompt", "--flagfile=x"]) == 0
    output, errors = capsys.readouterr()
    assert output == "a\x1b " + r"\x1b[2J\x07 中\r" + "\n\n"  # the prompt is the user's own
    assert errors == "fewer tokens\n" and asked[0][0] == "--flagfile=x"


def test_small_temperatures_are_accepted(asked: list[tuple[str, Any]]) -> None:
    for text in ("0", "1e-45", "5e-324", "1e-400", "1e308"):
        assert main.main(["generate", "--workdir=x", "--prompt=y", "--strategy=sample", f"--temperature={text}"]) == 0
    assert [sampling.temperature for _, sampling in asked] == [0.0, 1e-45, 5e-324, 0.0, 1e308]


@pytest.mark.parametrize("workdir", ["gs://bucket/run", "a\0b"])
def test_a_workdir_elsewhere_is_refused_in_python_too(workdir: str) -> None:
    with pytest.raises(UserError, match="^the workdir is .*, it must "):
        Model.open(workdir)
