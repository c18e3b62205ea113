"""Tasks as evaluators of a run: when they are done, what they give, on which mesh, and what is refused beforehand."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import glm_jax
from glm_jax.cli import main
from glm_jax.config import Experiment, resolve, with_changes
from glm_jax.errors import UserError
from glm_jax.evaluation import run as evaluation
from glm_jax.evaluation.tasks.build import build
from glm_jax.inference import Model
from glm_jax.training.observers.save import Save
from tests.evaluation import prose
from tests.patience import HANG

NAMES = ("last_word_en", "blank_zh-unidirectional")
MESHES = ({"data": 1, "pipeline": 1, "tensor": 1}, {"data": 2, "pipeline": 2, "tensor": 2})


def quiet(line: str) -> None:
    del line


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Return a config whose tasks are due every 2 and every 3 steps of 4."""
    made = prose.config(tmp_path_factory.mktemp("prose"))
    made.train.evaluators = ((NAMES[0], 2), (NAMES[1], 3), ("heldout", 4))
    return resolve(made)


def events(workdir: Path, kind: str) -> dict[int, dict[str, Any]]:
    """Return the events of a kind by step, each step once."""
    found = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    steps = [event["step"] for event in found if event["event"] == kind]
    assert len({*steps}) == len(steps)
    return {event["step"]: event for event in found if event["event"] == kind}


def trained(config: Experiment, workdir: Path, leave: int | None = None) -> None:
    """Train to the end, or to step `leave`, and leave without saving it."""
    with glm_jax.load(config, workdir, say=quiet) as run:
        assert isinstance(run.observers[-1], Save)  # or a kill after it would leave a checkpoint's step without scores
        for step in run.steps():
            if step.number == leave:
                break


@pytest.fixture(scope="module")
def finished(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("finished") / "run"
    trained(config, workdir)
    return workdir


@pytest.mark.slow
def test_each_task_is_done_when_it_is_due_and_gives_what_evaluate_gives(config: Experiment, finished: Path) -> None:
    found = events(finished, "tasks")
    tasks = {step: {name.partition("/")[2] for name in event if "/" in name} for step, event in found.items()}
    assert tasks == {0: {*NAMES}, 2: {NAMES[0]}, 3: {NAMES[1]}, 4: {*NAMES}}
    assert [*events(finished, "evaluation")] == [0, 4]  # heldout, in place of train.eval_every
    model = Model.open(finished)
    assert model.step == 4 and model.tokenizer
    todo = evaluation.plan(model.decoder, model.tokenizer, [build(name, config, quiet) for name in NAMES])
    done = dict(result for batch in evaluation.run(todo, {}) for result in batch.results)
    for report in evaluation.report(todo, done, resamples=0):
        (file,) = report.files
        for measure, key in (("Accuracy", "accuracy"), ("Nats a token", "nats_a_token")):
            assert found[4][f"{key}/{report.task.name}"] == pytest.approx(file.estimates[measure].value, rel=1e-5)
    nats = [found[step][f"nats_a_token/{NAMES[0]}"] for step in (0, 2, 4)]
    assert len({*nats}) == 3  # of the current params


@pytest.mark.slow
def test_a_run_that_resumes_has_the_same_events(config: Experiment, finished: Path, tmp_path: Path) -> None:
    """Left after step 3, it resumes from step 2."""
    trained(config, tmp_path / "run", leave=3)
    trained(config, tmp_path / "run")
    assert events(tmp_path / "run", "tasks") == events(finished, "tasks")


@pytest.mark.slow
def test_a_mesh_gives_the_same_numbers(config: Experiment, finished: Path, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    (tmp_path / "config.json").write_text((finished / "config.json").read_text())
    environment = {**os.environ, "JAX_PLATFORMS": "cpu", "JAX_NUM_CPU_DEVICES": "8"}
    done = subprocess.run([sys.executable, "-m", "tests.evaluation.test_during_training", path, tmp_path / "run"],
                          env=environment, capture_output=True, text=True, timeout=HANG)  # fmt: skip
    assert done.returncode == 0, done.stderr
    one, eight = events(finished, "tasks"), events(tmp_path / "run", "tasks")
    assert one.keys() == eight.keys()
    for step, event in one.items():
        for name in event.keys() - {"event", "step"}:
            # a question between two choices that are as likely may change sides
            near = 3.0 if name.startswith("accuracy") else 1e-4 * event[name]
            assert abs(eight[step][name] - event[name]) <= near, (step, name)


@pytest.mark.slow
def test_the_end_is_scored_even_if_the_last_steps_are_skipped(config: Experiment, tmp_path: Path) -> None:
    trained(with_changes(config, {"train.skip_steps": ((4, 4),)}), tmp_path / "run")
    assert [*events(tmp_path / "run", "tasks")] == [0, 2, 3, 4] and [*events(tmp_path / "run", "evaluation")] == [0, 4]


@pytest.mark.parametrize(
    "place, said",
    [
        ("last_word_eng", "names last_word_eng, which is no task and no task file: did you mean last_w"),
        ("wrong.yaml", "wrong.yaml, line 1: type is 'mol'"),
        ("lost.yaml", "file_pattern *.jsonl matches no file"),
        ("empty.yaml", "line 1: choices_pretokenized is missing"),
        ("argument_en", "train.evaluators: argument_en finds 0 questions"),
        ("last_word_en-unidirectiona", "which is no task"),
    ],
)
def test_what_cannot_be_done_is_refused_before_anything_is_written(
    config: Experiment, tmp_path: Path, place: str, said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("wrong.yaml").write_text("type: mol\nname: wrong\npath: .\n")
    Path("lost.yaml").write_text("name: lost\ntype: mul\npath: nowhere\nfile_pattern: '*.jsonl'\n")
    Path("empty.yaml").write_text("name: empty\ntype: mul\npath: data\n")
    Path("data").mkdir()
    Path("data/a.jsonl").write_text('{"inputs_pretokenized": "so"}\n')
    changed = with_changes(config, {"train.evaluators": ((NAMES[0], 2), (place, 2))})
    with pytest.raises(UserError) as error:
        glm_jax.load(changed, tmp_path / "run", say=quiet)
    assert said in str(error.value) and "train.evaluators" in str(error.value) and not (tmp_path / "run").exists()


def test_wrong_schedules_and_names_given_twice_are_refused(config: Experiment) -> None:
    for evaluators, said in (((("blank_en", 0),), "at least 1"), ((("blank_en", 2), ("blank_en", 3)), "twice"),
                             (("blank_en",), "pairs such as")):  # fmt: skip
        with pytest.raises(UserError, match=said):
            with_changes(config, {"train.evaluators": evaluators})


@pytest.mark.slow
def test_evaluate_takes_names(finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    flags = [f"--workdir={finished}", f"--out={tmp_path}", f"--data={tmp_path}", "--tasks", *NAMES, "argument_en"]
    assert main.main(["evaluate", *flags]) == 4
    assert "failed: argument_en finds 0 questions" in capsys.readouterr().err
    found = json.loads((tmp_path / "results.json").read_text())
    last = events(finished, "tasks")[4]
    assert [task["name"] for task in found["tasks"]] == [*NAMES]
    for task in found["tasks"]:
        value = task["groups"]["all"]["Nats a token"]["weighted"]
        np.testing.assert_allclose(value, last[f"nats_a_token/{task['name']}"], rtol=1e-5)


if __name__ == "__main__":
    from glm_jax.config import from_json

    saved = from_json(Path(sys.argv[1]).read_text())
    trained(with_changes(saved, {f"mesh.{axis}": size for axis, size in MESHES[1].items()}), Path(sys.argv[2]))
