"""What may change when a run resumes: its batch, its precision, the order of its data; and when it saves."""

import math
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from glm_jax.cli import main
from glm_jax.training import state
from glm_jax.training.stretch import Stretch
from glm_jax.workdir.checkpoints import Checkpoints
from tests.end_to_end.runs import flags, in_process, lines, train, train_events
from tests.proofs import kills

pytestmark = [in_process, pytest.mark.slow]

BASE: dict[str, Any] = {"train.eval_every": 0, "train.save_every": 100, "optimizer.decay_samples": 200}


def checkpoints(workdir: Path) -> list[int]:
    return sorted(int(path.name) for path in (workdir / "checkpoints").iterdir())


def test_a_batch_ramp_and_a_resume_within_it(experiment: Path, tmp_path: Path) -> None:
    """4 rows at first, 8 once 40 rows are seen, after ten steps of 4."""
    ramp = BASE | {"train.steps": 14, "train.batch_ramp": (4, 4, 40)}
    train(experiment, tmp_path / "whole", ramp)
    train(experiment, tmp_path / "parts", ramp | {"train.steps": 6})
    train(experiment, tmp_path / "parts", ramp)
    events = train_events(tmp_path / "whole")
    assert [event["batch"] for event in events.values()] == [4] * 10 + [8] * 4
    assert [event["samples"] for event in events.values()] == [*range(4, 44, 4), 48, 56, 64, 72]
    assert events == train_events(tmp_path / "parts")


def test_saving_by_the_clock_and_what_is_kept(experiment: Path, tmp_path: Path) -> None:
    often, rarely = tmp_path / "often", tmp_path / "rarely"
    train(experiment, often, BASE | {"train.steps": 12, "train.save_minutes": 1e-6, "train.keep": 100})
    saved = checkpoints(often)
    assert len(saved) > 3 and all(after - before >= 2 for before, after in zip(saved, saved[1:-1], strict=False))
    logged = [event["step"] for event in lines(often / "metrics.jsonl") if event["event"] == "checkpoint"]
    assert logged == saved
    keeping = {"train.steps": 10, "train.save_every": 2, "train.keep": 1, "train.keep_every": 4}
    train(experiment, rarely, BASE | keeping | {"train.save_minutes": 1000.0})
    assert checkpoints(rarely) == [4, 8, 10]


def test_another_data_seed_reshuffles_the_rest(experiment: Path, tmp_path: Path) -> None:
    whole, changed = tmp_path / "whole", tmp_path / "changed"
    train(experiment, whole, BASE | {"train.steps": 12})
    train(experiment, changed, BASE | {"train.steps": 6})
    train(experiment, changed, BASE | {"train.steps": 12, "data.seed": 77})
    before, after = train_events(whole), train_events(changed)
    assert all(before[step] == after[step] for step in range(1, 7))
    assert all(before[step]["loss"] != after[step]["loss"] for step in range(7, 13))
    (line,) = lines(changed / "interventions.jsonl")
    assert line["step"] == 6 and line["changes"] == {"data.seed": [-1, 77], "train.steps": [6, 12]}


def test_another_batch_resumes_with_the_next_row(experiment: Path, tmp_path: Path) -> None:
    train(experiment, tmp_path, BASE | {"train.steps": 6})
    train(experiment, tmp_path, BASE | {"train.steps": 9, "train.global_batch": 16})
    events = train_events(tmp_path)
    assert [event["samples"] for event in events.values()] == [8, 16, 24, 32, 40, 48, 64, 80, 96]
    # the rate follows the samples: 16 to warm up, then a cosine to 200
    assert events[9]["lr"] == pytest.approx(1e-4 + (1e-2 - 1e-4) * (1 + math.cos(math.pi * 80 / 184)) / 2, rel=1e-6)


def test_another_precision_resumes_with_its_own_loss_scale(experiment: Path, tmp_path: Path) -> None:
    for steps, precision in ((4, "float32"), (8, "float16"), (12, "bfloat16"), (14, "float16")):
        scale = {"train.loss_scale.initial": 2.0**14, "train.loss_scale.window": 3}
        train(experiment, tmp_path, BASE | scale | {"train.steps": steps, "train.precision": precision})
    events = train_events(tmp_path).values()
    high = 2.0**14
    assert [event["loss_scale"] for event in events] == [1] * 4 + [high] * 3 + [2 * high] + [1] * 4 + [high] * 2
    assert all(event["skipped"] == 0 and math.isfinite(event["loss"]) for event in events)
    assert [event["loss"] for event in events][-1] < 0.85 * [event["loss"] for event in events][0]
    changed = [line["changes"]["train.precision"] for line in lines(tmp_path / "interventions.jsonl")]
    assert changed == [["float32", "float16"], ["float16", "bfloat16"], ["bfloat16", "float16"]]


def test_half_precision_ends_where_float32_does(experiment: Path, tmp_path: Path) -> None:
    ends = {}
    for precision in ("float32", "bfloat16", "float16"):
        changes = {"train.steps": 60, "train.eval_every": 60, "optimizer.decay_samples": 0, "optimizer.peak_lr": 5e-3}
        train(experiment, tmp_path / precision, BASE | changes | {"train.precision": precision})
        found = kills.events(tmp_path / precision)
        last = [event["loss"] for (kind, step), event in found.items() if kind == "train" and step > 50]
        ends[precision] = sum(last) / 10, found["evaluation", 60]["loss"], found["evaluation", 0]["loss"]
    trained, heldout, first = ends["float32"]
    assert heldout < 0.8 * first
    for precision in ("bfloat16", "float16"):
        assert ends[precision][:2] == pytest.approx((trained, heldout), rel=0.01), ends


def test_a_stop_at_the_step_of_an_intervention_does_not_lose_it(
    experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    planned = BASE | {"train.steps": 6, "interventions": ((4, {"optimizer.peak_lr": 1e-3}),)}
    train(experiment, tmp_path / "whole", planned)
    hand_out = Stretch.batch

    def batch(part: Stretch, samples: int, rows: int) -> Any:
        if samples == 24:  # of step 4, after which the run stops and the change is due
            os.kill(os.getpid(), signal.SIGTERM)
        return hand_out(part, samples, rows)

    monkeypatch.setattr(Stretch, "batch", batch)
    stopped = main.main(["train", f"--config={experiment}", f"--workdir={tmp_path / 'parts'}", *flags(planned)])
    assert stopped == 3 and checkpoints(tmp_path / "parts") == [4]
    train(experiment, tmp_path / "parts", planned)
    assert train_events(tmp_path / "parts") == train_events(tmp_path / "whole")
    records = [lines(tmp_path / name / "interventions.jsonl") for name in ("parts", "whole")]
    assert records[0] == records[1] and [line["step"] for line in records[0]] == [4]


def test_a_run_that_is_stopped_at_any_moment_repeats_the_uninterrupted_run(
    experiment: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """Two signals in a row; those in the thread that writes reach the main thread at any of the next lines."""
    planned = BASE | {"train.steps": 6, "train.eval_every": 3, "train.save_every": 2}
    train(experiment, tmp_path / "whole", planned)
    for place, name, stops in (
        (Stretch, "train", 1),  # compiles
        (Stretch, "heldout", 0),
        (state, "to_disk", 2),
        (Checkpoints, "_complete", None),  # of step 2, while training continues
    ):
        workdir, work = tmp_path / name, getattr(place, name)
        with pytest.MonkeyPatch.context() as patch:

            def signalled(*arguments: Any, patch: Any = patch, work: Any = work, **named: Any) -> Any:
                patch.undo()
                for number in (signal.SIGUSR1, signal.SIGTERM):
                    os.kill(os.getpid(), number)
                return work(*arguments, **named)

            patch.setattr(place, name, signalled)
            code = main.main(["train", f"--config={experiment}", f"--workdir={workdir}", *flags(planned)])
        last, saved = capfd.readouterr().err.splitlines()[-1], max(checkpoints(workdir))
        assert saved == stops or stops is None and saved >= 2, name
        assert code == (3 if saved < 6 else 0), name
        assert code == 0 or last.startswith(f"stopped: step {saved} is saved in "), name
        train(experiment, workdir, planned)
        assert train_events(workdir) == train_events(tmp_path / "whole"), name
