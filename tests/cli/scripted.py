"""A model whose fills are known in advance, so that tests of the command compile nothing."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.errors import UserError
from glm_jax.inference import Model, batch
from glm_jax.inference.pending import Alternative, Filled, Settings
from glm_jax.inference.prompts import BLANK, Fill, Piece

Watch = Callable[[int, list[Piece]], None]


def answer(text: str, repeat: int) -> str:
    """Return what fills every blank of a text that comes again."""
    return f"<{text[:1]}{repeat}>"


def pieces(text: str, fill: str) -> list[Piece]:
    """Split a text at its blanks and fill them."""
    made = list[Piece]()
    for place, part in enumerate(BLANK.split(text)):
        if place:
            made.append(Piece(fill, (7, 8), fill=Fill(fill, (7, 8), (-0.5, -1.5), "end")))
        if part:
            made.append(Piece(part, ()))
    return made


class Scripted:
    """Answers as `answer` does, the longest text first.

    Attributes:
        asked: the calls of `fill_each`: texts, settings, numbers of equal texts before.
        opened: the arguments of `Model.open`.
        watched: whether each call of `fill_each` shows tokens one by one.
        before: called with a text before it is filled.
    """

    def __init__(self, before: Callable[[str], object] = len) -> None:
        mesh, config = (
            SimpleNamespace(shape={"data": 1, "pipeline": 1, "tensor": 1}),
            SimpleNamespace(compute="float32"),
        )
        self.decoder = SimpleNamespace(mesh=mesh, config=config, source="step 5 of here")
        self.step = 5
        self.tokenizer: SimpleNamespace | None = SimpleNamespace(digest="a tokenizer")
        self.asked: list[tuple[list[str], Settings, list[int]]] = []
        self.opened: list[tuple[Any, ...]] = []
        self.watched: list[bool] = []
        self.before, self.answer = before, answer

    def open(self, *arguments: Any, **named: Any) -> Scripted:
        self.opened.append((*arguments, *named.items()))
        return self

    def fill_each(
        self,
        texts: Sequence[str],
        settings: Settings,
        say: Callable[[str], None] | None = None,
        watch: Watch | None = None,
        *,
        repeats: Sequence[int],
        names: Sequence[str] | None = None,
    ) -> Iterator[tuple[int, Filled]]:
        self.asked.append((list(texts), settings, list(repeats)))
        self.watched.append(watch is not None)
        for number, text in enumerate(texts):
            if not text.strip():
                raise UserError(f"{names[number] + ': ' if names else ''}the prompt is empty")
        if say is not None and "long" in texts:
            say("fewer tokens")
        for number in sorted(range(len(texts)), key=lambda number: -len(texts[number])):
            self.before(texts[number])
            fill = self.answer(texts[number], repeats[number])
            if watch is not None:
                for size in range(1, len(fill) + 1):
                    watch(number, pieces(texts[number], fill[:size]))
            found = pieces(texts[number], fill)
            beams = (Alternative("best", -1.0), Alternative("other", -float("inf"))) if settings.beams > 1 else ()
            yield number, Filled(tuple(found), beams)


def install(monkeypatch: pytest.MonkeyPatch, before: Callable[[str], object] = len) -> Scripted:
    """Let `Model.open` return a scripted model, and return that."""
    model = Scripted(before)
    monkeypatch.setattr(Model, "open", model.open)
    monkeypatch.setattr("glm_jax.cli.generate_flags.check_workdir", lambda values: None)
    limit = "glm_jax.cli.generate_batch.batch_limit"  # which looks at real weights
    monkeypatch.setattr(limit, lambda decoder, beams: max(1, batch.ROWS // beams))
    return model


def workdir(folder: Path) -> Path:
    """Make what the command reads of a workdir besides the model."""
    step = folder / "run" / "checkpoints" / "5" / "params"
    step.mkdir(parents=True)
    (step / "weights").write_text("1")
    return folder / "run"


def kill(number: int, text: str) -> Callable[[str], None]:
    """Return a `before` that sends one signal when the turn of this text comes."""
    left = [number]

    def before(one: str) -> None:
        if one == text and left:
            os.kill(os.getpid(), left.pop())

    return before
