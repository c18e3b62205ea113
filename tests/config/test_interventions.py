"""The record of changes and the config that it leads to; tests/end_to_end/test_log_replay.py has whole runs."""

import errno
import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.config import Config, default_config, from_json, resolve, source, to_json
from glm_jax.config.interventions import after_spikes, changes, effective, next_step, numbers
from glm_jax.errors import UserError
from glm_jax.workdir import interventions
from glm_jax.workdir.interventions import RECORD, Record
from tests.journal import Journal

PLANNED = (
    (20, {"optimizer.peak_lr": 0.5, "train.skip_steps": ((30, 31),)}),
    (10, {"optimizer.peak_lr": 0.25}),
)


def build(**changes: Any) -> Config:
    config = default_config()
    config.train.steps = 100
    config.train.spike.rollbacks = 3
    for key, value in changes.items():
        config.update_from_flattened_dict({key.replace("__", "."): value})
    return resolve(config)


def test_interventions_take_effect_after_their_step_in_the_order_of_steps() -> None:
    config = build(optimizer__peak_lr=1.0, interventions=PLANNED)
    for step, peak in ((9, 1.0), (10, 0.25), (19, 0.25), (20, 0.5), (99, 0.5)):
        assert effective(config, step).optimizer.peak_lr == peak
    assert [next_step(config, step, 100) for step in (0, 9, 10, 19, 20)] == [10, 10, 20, 20, 100]
    assert next_step(config, 0, 5) == 5
    assert effective(config, 20).train.skip_steps == ((30, 31),)
    assert effective(config, 3) == config
    assert numbers(effective(from_json(to_json(config)), 25)) == numbers(effective(config, 25))


def test_spikes_skip_their_steps_and_use_up_rollbacks() -> None:
    config = build(train__skip_steps=((3, 4),))
    after = effective(config, 20, [(11, 13), (15, 19)])
    assert after.train.skip_steps == ((3, 4), (11, 13), (15, 19)) and after.train.spike.rollbacks == 1
    assert effective(config, 20, [(1, 1)] * 5).train.spike.rollbacks == 0
    assert numbers(after) == after_spikes(numbers(config), [(11, 13), (15, 19)])
    assert numbers(after) == after_spikes(numbers(after), [(11, 13), (15, 19)])  # already known
    assert changes(numbers(config), numbers(after)) == {
        "train.skip_steps": ([[3, 4]], [[3, 4], [11, 13], [15, 19]]),
        "train.spike.rollbacks": (3, 1),
    }


def test_how_a_run_is_executed_is_no_change() -> None:
    config = build(train__log_every=3, mesh__data=2, interventions=PLANNED)
    assert changes(numbers(config), numbers(build())) == {}


def test_the_record_forgets_what_will_be_done_again(tmp_path: Path) -> None:
    record = Record(tmp_path, 0)
    assert not (tmp_path / RECORD).exists()
    record.add(10, 80, "config", {"optimizer.peak_lr": (1.0, 0.5)})
    record.add(20, 160, "spike", {"train.skip_steps": ((), ((21, 22),))}, skipped=(21, 22), seen={"step": 22})
    record.add(20, 160, "planned", {"optimizer.peak_lr": (0.5, 0.1)})
    record.add(30, 240, "config", {"optimizer.peak_lr": (0.1, 0.2)})
    whole = (tmp_path / RECORD).read_text(encoding="utf-8")
    assert json.loads(whole.splitlines()[1]) == {
        "event": "intervention",
        "step": 20,
        "samples": 160,
        "cause": "spike",
        "changes": {"train.skip_steps": [[], [[21, 22]]]},
        "skipped": [21, 22],
        "seen": {"step": 22},
    }
    for step, steps in ((31, [10, 20, 20, 30]), (30, [10, 20, 20]), (20, [10, 20]), (19, [10]), (10, [])):
        (tmp_path / RECORD).write_text(whole, encoding="utf-8")
        again = Record(tmp_path, step)
        assert [line["step"] for line in again.lines] == steps
        assert [line["step"] for line in interventions.read(tmp_path / RECORD)] == steps
        assert again.skipped() == [(21, 22)] * (step >= 20)


def test_a_line_that_was_cut_off_is_dropped_and_a_damaged_one_named(tmp_path: Path) -> None:
    Record(tmp_path, 0).add(10, 80, "config", {"optimizer.peak_lr": (1.0, 0.5)})
    path = tmp_path / RECORD
    whole = path.read_text(encoding="utf-8")
    path.write_text(whole + whole[:30], encoding="utf-8")
    Record(tmp_path, 20).add(20, 160, "config", {"optimizer.peak_lr": (0.5, 0.1)})
    assert [line["step"] for line in interventions.read(path)] == [10, 20]
    path.write_text(whole[:30] + "\n" + whole, encoding="utf-8")
    with pytest.raises(UserError, match="line 1, is damaged"):
        Record(tmp_path, 20)
    lines = ("garbage", "5", '{"step": 1, "cause": "config", "changes": {"optimizer.peak_lr": 5}}',
             '{"step": 1, "cause": "spike", "changes": {}}')  # fmt: skip
    for line in lines:  # whole, but not lines of a record
        path.write_text(line + "\n", encoding="utf-8")
        with pytest.raises(UserError, match="line 1, is damaged"):
            interventions.read(path)
    with pytest.raises(UserError, match="cannot be read as a record"):
        interventions.read(tmp_path / "none.jsonl")


def test_a_full_disk_is_reported_in_a_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record(tmp_path, 0)
    record.add(10, 80, "config", {"optimizer.peak_lr": (1.0, 0.5)})

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match="No space left on device.*make room"):
        record.add(20, 160, "config", {"optimizer.peak_lr": (0.5, 0.1)})
    with pytest.raises(UserError, match="No space left on device.*make room"):
        record.forget(10)


def test_a_line_is_on_the_disk_before_the_run_continues(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    record, journal = Record(tmp_path, 0), Journal(monkeypatch)
    for step in (10, 20):
        record.add(step, 8 * step, "config", {"optimizer.peak_lr": (1.0, 0.5)})
        assert journal.is_safe(tmp_path / RECORD)
    record.forget(20)
    assert journal.renamed[0][1:] == (tmp_path / RECORD, True) and len(interventions.read(tmp_path / RECORD)) == 1
    record.forget(20)
    assert len(journal.renamed) == 1  # nothing to forget, nothing written


def test_what_a_run_began_with_is_kept_at_step_0(tmp_path: Path) -> None:
    record = Record(tmp_path, 0)
    record.add(0, 0, "init_from", {}, weights={"path": "weights"})
    record.add(0, 0, "planned", {"optimizer.peak_lr": (1.0, 0.5)})  # made again
    assert [line["cause"] for line in Record(tmp_path, 0).lines] == ["init_from"]


def test_other_processes_know_the_record_and_do_not_write(tmp_path: Path) -> None:
    Record(tmp_path, 0).add(10, 80, "config", {"optimizer.peak_lr": (1.0, 0.5)})
    whole = (tmp_path / RECORD).read_bytes()
    other = Record(tmp_path, 5, primary=False)
    assert other.lines == []
    other.add(5, 40, "spike", {}, skipped=(6, 7))
    assert other.skipped() == [(6, 7)] and (tmp_path / RECORD).read_bytes() == whole


def test_a_record_is_a_plan(tmp_path: Path) -> None:
    config, record = build(), Record(tmp_path, 0)
    record.add(0, 0, "init_from", {}, weights={"path": "runs/other"})  # nothing to replay
    there = source(path="zh.txt", weight=2.0)
    added = {f"data.sources.zh.{key}": (None, value) for key, value in there.items()}
    record.add(10, 80, "config", {"optimizer.rewarm": ((), ((10, 4),)), **added})
    record.add(20, 160, "spike", {"train.skip_steps": ((), ((21, 22),))}, skipped=(21, 22))
    record.add(30, 240, "config", {key: (after, None) for key, (_, after) in added.items()})
    planned = build(interventions=interventions.plan(interventions.read(tmp_path / RECORD)))
    assert [step for step, _ in planned.interventions] == [10, 20, 30]
    after = effective(planned, 10)
    assert after.optimizer.rewarm == ((10, 4),) and after.data.sources["zh"].weight == 2.0
    assert effective(planned, 20).train.skip_steps == ((21, 22),)
    assert effective(planned, 9).optimizer.rewarm == config.optimizer.rewarm == ()
    assert "zh" in effective(planned, 29).data.sources and "zh" not in effective(planned, 30).data.sources
