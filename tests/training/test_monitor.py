"""The record of a run: what is written, and what a resumed run drops because it will be done again."""

import json
import time
from pathlib import Path

import jax
import pytest

from glm_jax.model import GLMConfig
from glm_jax.parallel import mesh as meshes
from glm_jax.training.engine import EngineConfig
from glm_jax.training.monitor import Meter, Monitor, matmul_rate, peak_flops


def read(workdir: Path) -> list[dict]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]


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
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2


def test_a_run_that_starts_again_at_0_drops_its_first_evaluation(tmp_path: Path) -> None:
    for loss in (9.0, 8.0):
        monitor = Monitor(tmp_path, total_steps=9, first_step=0)
        monitor.log({"event": "evaluation", "step": 0, "loss": loss})
        monitor.close()
    assert read(tmp_path) == [{"event": "evaluation", "step": 0, "loss": 8.0}]


def test_the_bar_shows_steps_and_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    monitor = Monitor(tmp_path, total_steps=4, first_step=1)
    monitor.progress(1, {"mask": "5.000"})
    monitor.say("a line")
    monitor.close()
    shown = capsys.readouterr().err
    assert "2/4" in shown and "mask=5.000" in shown and "a line\n" in shown


def test_the_meter_counts_from_the_last_read() -> None:
    cfg = GLMConfig(1, 16, 2, 24, 32)
    meter = Meter(EngineConfig(cfg, 32, 3, keep="stage"), 8, peak=1e9)
    meter.count(4, 30)
    with meter.waiting():
        time.sleep(0.05)
    first = meter.read()
    assert 0 < first["data_wait"] <= 1 and first["tokens_per_second"] <= 30 / 0.05
    assert first["mfu"] == pytest.approx(first["tokens_per_second"] * 4 / 30 * 3 * cfg.forward_flops(8) / 1e9)
    assert first["hfu"] == pytest.approx(first["mfu"] * 5 / 3)
    assert meter.read()["tokens_per_second"] == 0


def test_emulated_devices_share_one_measured_peak() -> None:
    mesh = meshes.build({"data": 1, "pipeline": 1, "tensor": 1})
    assert 0.1 < peak_flops(mesh) / matmul_rate() < 10 and jax.devices()[0].platform == "cpu"
