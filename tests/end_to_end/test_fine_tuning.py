"""`glm-jax train` on chats alone, with a tokenizer from a file."""

import json
from pathlib import Path

import pytest

from glm_jax.cli import main
from glm_jax.data.tokenizers import sentencepiece
from tests.end_to_end.runs import in_process, lines, train

RECORDS = [
    {"messages": [{"role": "user", "content": f"{word} {n}?"}, {"role": "assistant", "content": f"{word} is {n}."}]}
    for n in range(20) for word in ("model", "array")
]  # fmt: skip


@in_process
@pytest.mark.slow
def test_a_run_on_chats_alone(experiment: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "t.model").write_bytes(sentencepiece.train(map(str, RECORDS * 9), 400))
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in [*RECORDS, {"messages": []}]))
    chats = tmp_path / "chats.py"
    chats.write_text(experiment.read_text(encoding="utf-8").replace("    return config", f"""
    from glm_jax.config import instructions

    config.data.sources = {{}}
    config.data.instructions.chats = instructions(path="{tmp_path}/chats.jsonl")
    config.data.tokenizer.path = "{tmp_path}/t.model"
    config.data.heldout = 0.2
    config.data.blanks.update({{"mask": 0.0, "gmask": 0.0, "instruction": 1.0, "instruction_segments": 1}})
    return config"""), encoding="utf-8")  # fmt: skip
    assert main.main(["train", f"--config={chats}", f"--workdir={tmp_path / 'second'}"]) == 2
    assert "chats.jsonl, line 41: messages has no turn of the assistant" in capsys.readouterr().err
    (tmp_path / "chats.jsonl").write_text("".join(f"{json.dumps(record)}\n" for record in RECORDS))
    train(chats, tmp_path / "second", {"train.steps": 12})
    events = lines(tmp_path / "second" / "metrics.jsonl")
    evaluations = [event for event in events if event["event"] == "evaluation"]
    assert set(evaluations[0]) == {"event", "step", "loss", "loss/chats", "bits_per_byte/chats"}
    assert evaluations[-1]["loss/chats"] == evaluations[-1]["loss"] < evaluations[0]["loss"]
    trained = [event for event in events if event["event"] == "train"]
    assert all("loss/instruction" in event and "loss/mask" not in event for event in trained)
