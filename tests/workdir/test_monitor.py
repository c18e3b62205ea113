"""The record of a run: what is written, and what a resumed run drops because it will be repeated."""

import io
import json
import math
import re
import struct
import sys
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from tensorboardX.proto import event_pb2
from tensorboardX.record_writer import RecordWriter

from glm_jax.errors import UserError
from glm_jax.workdir import events
from glm_jax.workdir.monitor import Monitor

TRAIN = {"event": "train", "step": 2, "loss": 14.98765, "lr": 1.2e-4, "tokens_per_second": 123_456.7}


def read(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


def board(workdir: Path) -> dict[str, dict[int, float]]:
    """Read {name: {step: value}} from all event files in order, as TensorBoard does: a start drops later steps."""
    values: dict[str, dict[int, float]] = {}
    for path in sorted((workdir / "tensorboard").iterdir()):
        content = path.read_bytes()
        while content:
            (length,) = struct.unpack("<Q", content[:8])
            event = event_pb2.Event.FromString(content[12 : 12 + length])  # pyright: ignore[reportAttributeAccessIssue]
            content = content[12 + length + 4 :]
            if event.HasField("session_log"):
                values = {name: {s: v for s, v in found.items() if s < event.step} for name, found in values.items()}
            for value in event.summary.value:
                values.setdefault(value.tag, {})[event.step] = value.simple_value
    return values


def test_a_resumed_run_drops_what_came_after_its_checkpoint_and_a_torn_line(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=9, first_step=0)
    for step in (1, 2, 3, 4):
        monitor.log({"event": "train", "step": step, "loss": 1.0 / step})
    monitor.close()
    with open(tmp_path / "metrics.jsonl", "a", encoding="utf-8") as file:
        file.write('{"event": "train", "st')
    monitor = Monitor(tmp_path, total_steps=9, first_step=2)
    monitor.log({"event": "train", "step": 3, "loss": 0.5})
    monitor.close()
    assert read(tmp_path) == [{"event": "train", "step": s, "loss": loss} for s, loss in ((1, 1.0), (2, 0.5), (3, 0.5))]
    assert board(tmp_path) == {"0_loss/train": {1: 1.0, 2: 0.5, 3: 0.5}}


def test_lists_become_a_scalar_a_layer_and_text_stays_in_the_jsonl(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=9, first_step=0)
    rms = [float(layer) for layer in range(11)]
    written = [
        {"event": "train", "step": 1, "loss": 2.0, "activation_rms": rms},
        {"event": "checkpoint", "step": 1, "error": "disk full"},
        {"event": "start", "step": 1, "versions": {"jax": "1"}},
    ]
    for event in written:
        monitor.log(event)
    monitor.close()
    assert read(tmp_path) == written
    layers = {f"train/activation_rms/layer_{layer:02d}": {1: float(layer)} for layer in range(11)}
    assert board(tmp_path) == {"0_loss/train": {1: 2.0}, **layers}


def test_numbers_that_are_not_finite_are_null_for_every_reader_of_json(tmp_path: Path) -> None:
    monitor = Monitor(tmp_path, total_steps=9, first_step=0)
    monitor.log({"event": "train", "step": 1, "loss": math.nan, "activation_rms": [1.0, math.inf], "lr": 0.5})
    monitor.close()
    (line,) = (tmp_path / "metrics.jsonl").read_text().splitlines()
    read = json.loads(line, parse_constant=pytest.fail)
    assert (read["loss"], read["activation_rms"], read["lr"]) == (None, [1.0, None], 0.5)


def test_losses_come_first_in_tensorboard() -> None:
    event = {"event": "evaluation", "step": 1, "bits_per_byte/en": 1.0, "loss/en": 2.0, "loss": 3.0}
    names = dict(events.scalars(event))
    assert sorted(names)[:2] == ["0_loss/evaluation", "0_loss/evaluation/en"]
    assert names == {"evaluation/bits_per_byte/en": 1.0, "0_loss/evaluation/en": 2.0, "0_loss/evaluation": 3.0}


def test_going_back_drops_the_events_after_a_step_everywhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monitor = Monitor(tmp_path, total_steps=9, first_step=0)
    for step in (1, 2, 3, 4):
        monitor.log({"event": "train", "step": step, "loss": 8.0})
        monitor.progress(1)
    monitor.rewind(2)
    monitor.progress(1)
    monitor.log({"event": "train", "step": 3, "loss": 0.5})
    monitor.close()
    assert [(event["step"], event["loss"]) for event in read(tmp_path)] == [(1, 8.0), (2, 8.0), (3, 0.5)]
    assert board(tmp_path) == {"0_loss/train": {1: 8.0, 2: 8.0, 3: 0.5}}
    shown = capsys.readouterr().err
    assert re.findall(r"(\d)/9", shown)[-1] == "3" and "2/9" in shown


def test_only_the_primary_process_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, total_steps=9, first_step=0, primary=False, wandb_project="none")
    monitor.log({"event": "train", "step": 1, "loss": 2.0})
    monitor.progress(1, TRAIN)
    monitor.say("a line")
    monitor.rewind(0)
    monitor.close()
    assert not list(tmp_path.iterdir()) and capsys.readouterr().err == ""


class FullDisk(io.BytesIO):
    """A file on a disk with room for a few bytes, and for more once `room` is raised."""

    room = 20

    def write(self, data: Any) -> int:
        written = min(len(data), self.room - self.tell())
        if not written:
            raise OSError(28, "No space left on device")
        return super().write(data[:written])


def test_a_full_disk_is_reported_once_and_loses_no_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monitor = Monitor(tmp_path, total_steps=9, first_step=0)
    jsonl = next(sink for sink in monitor._sinks if isinstance(sink, events.Jsonl))
    jsonl._file.close()
    full = FullDisk()
    monkeypatch.setattr(jsonl, "_file", full)
    written = [{"event": "train", "step": step, "loss": 1.0} for step in (1, 2, 3)]
    monitor.log(written[0])
    monitor.log(written[1])
    full.room = 10**6
    monitor.log(written[2])
    assert full.getvalue().decode().splitlines() == [json.dumps(event) for event in written]
    monitor.close()
    assert capsys.readouterr().err.count("metrics.jsonl cannot be written (No space left on device)") == 1


def test_after_a_full_disk_tensorboard_continues_in_another_file(tmp_path: Path) -> None:
    sink = events.TensorBoard(tmp_path / "tensorboard", -1)
    sink.write({"event": "train", "step": 1, "loss": 2.0})
    sink.close()
    sink._writer = RecordWriter(str(tmp_path / "full"))
    assert sink._writer._writer is not None
    sink._writer._writer.close()
    sink._writer._writer = FullDisk()
    with pytest.raises(OSError, match="No space"):
        sink.write({"event": "train", "step": 2, "loss": 2.0})
    sink.write({"event": "train", "step": 3, "loss": 3.0})
    sink.close()
    assert board(tmp_path) == {"0_loss/train": {1: 2.0, 3: 3.0}}


class Wandb(ModuleType):
    """The part of the package wandb that a run uses."""

    class Error(Exception):
        """The type of all of wandb's errors."""

    def __init__(self, online: bool) -> None:
        super().__init__("wandb")
        self.online, self.started, self.logged, self.finished = online, [], [], 0

    def init(self, **options: Any) -> Any:
        self.started.append(options)
        if not self.online and options.get("mode") != "offline":
            raise self.Error("api_key not configured")
        return self

    def define_metric(self, name: str, step_metric: str) -> None:
        assert (name, step_metric) == ("*", "step")

    def log(self, values: Mapping[str, Any]) -> None:
        self.logged.append(values)

    def finish(self) -> None:
        self.finished += 1


def test_tensorboard_lags_by_half_a_minute_at_most(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes, times = [], [1000.0, 1030.0, 1030.1, 1060.0, 1060.2]
    monkeypatch.setattr(events.time, "monotonic", lambda: times[len(sizes)])
    sink = events.TensorBoard(tmp_path, 0)
    for step in range(len(times)):
        sink.write({"event": "train", "step": step, "loss": 1.0})
        sizes.append(next(tmp_path.iterdir()).stat().st_size)
    sink.close()
    assert sizes[0] == sizes[1] < sizes[2] == sizes[3] < sizes[4]


@pytest.mark.parametrize("online", [True, False])
def test_weights_and_biases_follow_one_run_over_restarts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, online: bool
) -> None:
    wandb = Wandb(online)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    for first in (0, 1):
        monitor = Monitor(tmp_path / "run", total_steps=9, first_step=first, wandb_project="glm")
        monitor.log({"event": "train", "step": first + 1, "loss": 2.0, "activation_rms": [1.0], "error": "text"})
        monitor.rewind(first)
        monitor.close()
    assert len(wandb.started) == (2 if online else 4) and wandb.finished == 2
    assert {(run["project"], run["name"], run["resume"]) for run in wandb.started} == {("glm", "run", "allow")}
    assert len({run["id"] for run in wandb.started}) == 1 and len(wandb.started[0]["id"]) == 16
    assert wandb.started[-1].get("mode") == (None if online else "offline")
    values = {"0_loss/train": 2.0, "train/activation_rms/layer_00": 1.0}
    assert wandb.logged == [{"step": 1, **values}, {"step": 2, **values}]


def test_a_project_without_the_package_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(UserError, match="pip install wandb"):
        Monitor(tmp_path, total_steps=9, first_step=0, wandb_project="glm")
    assert not list(tmp_path.iterdir())


def test_metrics_that_cannot_be_written_are_one_line(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").mkdir()
    with pytest.raises(UserError, match="metrics.jsonl cannot be written: Is a directory"):
        Monitor(tmp_path, total_steps=9, first_step=0)


def test_a_run_that_starts_again_at_0_drops_its_first_evaluation(tmp_path: Path) -> None:
    for loss in (9.0, 8.0):
        monitor = Monitor(tmp_path, total_steps=9, first_step=0)
        monitor.log({"event": "evaluation", "step": 0, "loss": loss})
        monitor.close()
    assert read(tmp_path) == [{"event": "evaluation", "step": 0, "loss": 8.0}]


def test_a_terminal_shows_a_bar_of_60_columns(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monitor = Monitor(tmp_path, total_steps=100_000, first_step=1)
    monkeypatch.setattr(monitor._bar, "dynamic_ncols", lambda _: (60, 24))
    monitor.progress(1, TRAIN)
    monitor.say("a line")
    monitor.close()
    shown = capsys.readouterr().err
    bars = [line for line in re.split("[\r\n]", shown) if "2/100000" in line]
    assert "a line\n" in shown and bars and all(len(bar) <= 60 for bar in bars)
    assert "loss 14.99, lr 1.2e-04, 123,457 tok/s" in bars[-1]


def test_without_a_terminal_progress_is_a_line_every_event(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monotonic = iter([100.0, 130.0])
    monkeypatch.setattr("glm_jax.workdir.monitor.time.monotonic", lambda: next(monotonic))
    monitor = Monitor(tmp_path, total_steps=10, first_step=0)
    for _ in range(3):
        monitor.progress(1)
    monitor.progress(1, TRAIN | {"step": 4})
    monitor.say("a line")
    (progress, line) = capsys.readouterr().err.splitlines()
    monkeypatch.undo()
    monitor.close()
    assert re.fullmatch(r"\d\d:\d\d:\d\d step 4/10, loss 14.99, lr 1.2e-04, 123,457 tok/s, 00:45 left", progress)
    assert line == "a line"
    silent = Monitor(tmp_path, total_steps=10, first_step=0, primary=False)
    silent.progress(1, TRAIN)
    silent.say("a line")
    silent.close()
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (None, "is missing or empty: it begins at step 2"),
        ("", "is missing or empty: it begins at step 2"),
        ('{"event": "train", "step": 1}\n{"event": "tra\n[]\n', "2 damaged lines are left out, the first is line 2"),
        ('{"event": "train", "step": 1}\n{"event": "tra', None),  # an interrupted write
    ],
)
def test_a_resumed_run_names_damage_to_its_log(
    tmp_path: Path, content: str | None, said: str | None, capsys: pytest.CaptureFixture[str]
) -> None:
    if content is not None:
        (tmp_path / "metrics.jsonl").write_text(content)
    Monitor(tmp_path, 4, 2).close()
    lines = [line for line in capsys.readouterr().err.splitlines() if "metrics.jsonl" in line]
    assert len(lines) == (said is not None) and all(said in line for line in lines if said)
