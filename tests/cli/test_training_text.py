"""`glm-jax evaluate --contamination`: what a run's training text has of a task."""

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from glm_jax.cli import main, training_text
from glm_jax.config import resolve, small_english, to_json
from tests.evaluation import official_form

SEEN = "the boat that came down the river in spring had no name and no flag at all"  # 17 words
OTHER = "a letter which nobody has opened lies below the floor of a house in the hills"


def test_a_task_is_found_in_training_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Of two questions one is in the text, with its answer in its blank; the held-out part does not count."""
    workdir = official_form.workdir(tmp_path)
    arguments = ["evaluate", f"--workdir={workdir}", "--contamination", f"--out={tmp_path / 'out'}", "--tasks"]
    asked = [{"inputs_pretokenized": text.replace("flag", "[MASK]"), "choices_pretokenized": ["sail", "flag"],
              "label": 1} for text in (SEEN, OTHER)]  # fmt: skip
    official_form.jsonl(tmp_path / "data/a.jsonl", asked)
    official_form.task(tmp_path, "task", "name: task\ntype: mul\npath: data\n")
    assert main.main([*arguments, str(tmp_path / "task.yaml")]) == 2
    assert "names no training text: leave out --contamination" in capsys.readouterr().err
    texts = [
        f"Once, THE BOAT, that {SEEN[14:].upper()}!",
        OTHER[:60],
        *(f"another text, number {n}" for n in range(30)),
    ]
    official_form.jsonl(tmp_path / "corpus.jsonl", [{"text": text} for text in texts])
    config = json.loads((workdir / "config.json").read_text())
    config["data"] |= {"sources": {"en": {"path": str(tmp_path / "corpus.jsonl"), "format": "jsonl"}},
                       "cache": str(tmp_path / "cache"), "heldout": 0.0}  # fmt: skip
    (workdir / "config.json").write_text(json.dumps(config))
    assert main.main([*arguments, str(tmp_path / "task.yaml")]) == 0
    (task,) = json.loads((tmp_path / "out/results.json").read_text())["tasks"]
    grams = (len(OTHER.split()) - 12) + (17 - 12)
    assert task["files"][0]["contamination"] == {"size": 13, "items": 2, "found_items": 1, "ngrams": grams,
                                                 "found_ngrams": 5}  # fmt: skip
    assert f"| 50.00% of 2 | {500 / grams:.2f}% of {grams} |" in (tmp_path / "out/results.md").read_text()
    assert "items in training text</th>" in (tmp_path / "out/index.html").read_text()


def test_a_set_that_is_only_scored_is_no_training_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sides = {name: SimpleNamespace(train=name) for name in ("shown", "unshown")}
    prepared = SimpleNamespace(shards={"en": {"train": "text"}}, instructions=sides, instruction_weights={"shown": 1.0})
    monkeypatch.setattr(training_text, "prepare", lambda *_, **__: prepared)
    (tmp_path / "config.json").write_text(to_json(resolve(small_english(steps=1))))
    tokenizer: Any = None
    assert training_text.documents(tmp_path, tokenizer, print) == ["text", "shown"]
