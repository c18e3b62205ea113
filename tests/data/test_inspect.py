"""What `corpus inspect` prints: the histogram, and rows whose blanks are filled in."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from glm_jax.config.data import OBJECTIVES
from glm_jax.data import inspect
from glm_jax.data.instructions.prompts import open_sides
from glm_jax.data.rows.rows import Rows
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train

TEXT = "the array has a shape and the shape has an axis, and the axis has an index into the array. "


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(train([TEXT * 20], 300))


def test_histogram():
    lines = inspect.histogram(np.array([1] * 3 + [2, 3] * 20 + [9], np.int64))
    assert [line.split("  ")[0] for line in map(str.strip, lines)] == ["1 to 1", "2 to 3", "4 to 7", "8 to 15"]
    assert [line.count("#") for line in lines] == [3, 40, 0, 1]
    assert [int(line.replace("#", "").split()[3]) for line in lines] == [3, 40, 0, 1]


def make_batch(tokenizer: SentencePieceTokenizer) -> Rows[np.ndarray]:
    """Return one row of two samples: "a [MASK] b [MASK] c" with targets in reverse order, and "d [gMASK]"."""
    one, two, three, four = (tokenizer.encode(text).tolist() for text in ("an array", " of ", " shape", "index"))
    first = [*one, tokenizer.mask, *two, tokenizer.mask, tokenizer.eos, *three]
    blanks = [place for place, token in enumerate(first) if token == tokenizer.mask]
    second = [*four, tokenizer.gmask]
    spans = [(blanks[1], tokenizer.encode("axes")), (blanks[0], tokenizer.encode(" big"))]
    row: dict[str, list[int]] = {name: [] for name in ("tokens", "targets", "positions", "segments", "context")}

    def add(tokens: list[int], targets: list[int], positions: list[int], segment: int, context: bool) -> None:
        row["tokens"] += tokens
        row["targets"] += targets
        row["positions"] += positions
        row["segments"] += [segment] * len(tokens)
        row["context"] += [context] * len(tokens)

    add(first, [0] * len(first), list(range(len(first))), 1, True)
    for position, span in spans:
        add([tokenizer.sop, *span], [*span, tokenizer.eop], [position] * (len(span) + 1), 1, False)
    add(second, [0] * len(second), list(range(len(second))), 2, True)
    rest = [*tokenizer.encode(" of the"), tokenizer.eos, *tokenizer.encode("shape")]
    positions = list(range(len(second) - 1, len(second) + len(rest)))
    add([tokenizer.sop, *rest], [*rest, tokenizer.eop], positions, 2, False)
    add([tokenizer.pad] * 3, [0] * 3, [0] * 3, 0, False)
    batch = {name: np.array([values]) for name, values in row.items()}
    objective, source = np.array([OBJECTIVES.index("mask")]), np.array([1])
    return Rows(**batch, loss_mask=~batch["context"], objective=objective, source=source)


@pytest.mark.parametrize("streams", [1, 2])
def test_blanks_are_filled_in(tokenizer: SentencePieceTokenizer, streams: int):
    batch = make_batch(tokenizer)
    if streams == 2:
        batch = batch._replace(positions=np.stack([batch.positions, np.zeros_like(batch.positions)], axis=1))
    header, first, second = inspect.rows(batch, ("en", "zh"), tokenizer, coloured=False)
    assert header == "row 0: zh, mask"
    assert first == "an array[MASK:  big] of [MASK: axes] <eos>  shape"
    assert second == "index[gMASK:  of the <eos> shape]"


def test_each_blank_has_its_colour_on_a_terminal(tokenizer: SentencePieceTokenizer):
    _, first, _ = inspect.rows(make_batch(tokenizer), ("en", "zh"), tokenizer, coloured=True)
    red, green, plain = *inspect.COLOURS[:2], inspect.PLAIN
    assert first == f"an array{red}[MASK:  big]{plain} of {green}[MASK: axes]{plain} <eos>  shape"


def test_what_was_left_out_is_told_with_its_place(tmp_path: Path):
    skipped = {"empty answer": {"count": 1200, "places": [{"file": "/a.jsonl", "line": 7}] * 2}}
    for name, numbers in (("lengths", [5, 9, 9, 70, 80]), ("answers", [1, 2, 1, 3, 70]), ("digests", [7, 7, 7, 7, 8])):
        np.save(
            tmp_path / f"{name}.npy", np.array(numbers, np.int64).astype(np.uint64 if name == "digests" else np.int64)
        )
    (tmp_path / "index.json").write_text(json.dumps({"samples": 5, "unasked": 4, "skipped": skipped}))
    (tmp_path / "tokens.bin").write_bytes(bytes(4 * 173))
    asked = open_sides(tmp_path, 0.0, 64)
    prepared: Any = SimpleNamespace(indexes={}, instructions={"asked": asked}, instruction_weights={"asked": 3.0})
    assert list(inspect.counts(prepared))[:7] == [
        "asked (instructions, weight 3)",
        "  train    4 samples, 93 tokens",
        "  heldout  0 samples, 0 tokens",
        "  too long 1 prompts cut at their beginning, 1 samples left out",
        "  unasked  4 with nothing to ask",
        "  skipped  1,200 empty answer, the first in /a.jsonl, line 7",
        "  tokens a sample",
    ]
