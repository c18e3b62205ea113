"""`glm-jax evaluate --harness`: lm-eval's own tasks on made-up records, what fails, and what resumes."""

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.cli import main
from glm_jax.evaluation import lm_eval_requests, results
from glm_jax.inference import Model
from tests.evaluation import lm_eval_data, official_form
from tests.patience import HANG

Run = Callable[..., tuple[int, str, str]]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("harness")
    official_form.workdir(made)
    lm_eval_data.own(made / "tasks")
    return made


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["evaluate", f"--workdir={folder / 'run'}", "--harness", *map(str, arguments)])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


def read(out: Path) -> dict[str, Any]:
    """Return the tasks of an evaluation, by name."""
    return {task["name"]: task for task in json.loads((out / "results.json").read_text())["tasks"]}


def test_examples_come_before_questions_and_are_no_texts_of_theirs(folder: Path) -> None:
    from glm_jax.evaluation import lm_eval_tasks
    from glm_jax.evaluation.few_shot import Shots

    reader = lm_eval_requests.Reader.of(Model.open(folder / "run"))
    plans = [lm_eval_tasks.plan(reader, ["local_copa"], folder / "tasks", Shots(count, 1234)) for count in (0, 2)]
    assert not plans[0].failures + plans[1].failures
    (none,), (two,) = (plan.parts for plan in plans)
    assert (none.work.shots, two.work.shots) == (0, 2) and "2-shot" in two.name and "0-shot" in none.name
    assert none.work.texts() == two.work.texts() and len(two.work.texts()) == two.work.items == none.work.items
    assert sum(map(two.work.tokens, range(two.work.count))) > sum(map(none.work.tokens, range(none.work.count)))


@pytest.mark.slow
def test_its_own_tasks_have_the_values_of_its_own_evaluator(folder: Path, run: Run) -> None:
    from lm_eval import __version__
    from lm_eval.evaluator import simple_evaluate
    from lm_eval.tasks import TaskManager

    from glm_jax.evaluation.lm_eval_model import GlmJax

    names = [f"local_{name}" for name in lm_eval_data.OWN]
    code, output, errors = run("--tasks", ",".join(names), "--include", folder / "tasks", "--out", folder / "out")
    assert code == 0, errors
    assert sorted(os.listdir(folder / "out")) == ["index.html", "items.jsonl", "results.json", "results.md"]
    manager = TaskManager(include_path=folder / "tasks", include_defaults=False)
    model = GlmJax(Model.open(folder / "run"))
    whole: Any = simple_evaluate(model, tasks=[*names], task_manager=manager, bootstrap_iters=0)
    expected: Mapping[str, Mapping[str, Any]] = whole["results"]
    tasks = read(folder / "out")
    assert [*tasks] == names and len(names) >= 6
    for name, task in tasks.items():
        (file,) = task["files"]
        assert file["items"] == lm_eval_data.DOCUMENTS and f"{name}\tall\t" in output
        assert file["file"].startswith(f"{name}, version {whole['versions'][name]}, {whole['n-shot'][name]}-shot")
        assert task["module"] == f"lm-eval {__version__}"
        found = {}
        for measure, estimate in file["measures"].items():
            kind, _, metric = measure.partition("/")
            key = metric if "," in metric else f"{metric},none"
            found[key] = pytest.approx(estimate["value"], rel=1e-6)
            assert kind == "whole" or estimate["low"] <= estimate["value"] <= estimate["high"]
        values = {key: value for key, value in expected[name].items() if "," in key and "stderr" not in key}
        assert found == values and values
    cut = {name: task["files"][0]["truncated"] for name, task in tasks.items()}
    assert cut["local_gsm8k"] == 60 and cut["local_wikitext"] == 0  # five examples in 64 tokens; windows
    assert "local_gsm8k, version 3.0, 5-shot: 60 of 60 items keep only the end of a context" in errors
    assert "answers have up to 32 tokens, not 256" in errors
    page = (folder / "out/index.html").read_text()
    assert "local_hellaswag" in page and "mean/acc_norm" in page and page.count('class="example"') > 20


@pytest.mark.slow
def test_what_fails_is_named_and_the_other_tasks_run(folder: Path, run: Run, tmp_path: Path) -> None:
    pairs = [{"text": f"the {noun}", "target": "is old"} for noun in lm_eval_data.NOUNS]
    plain = {"doc_to_text": "{{text}}", "doc_to_target": "{{target}}", "output_type": "generate_until"}
    short = {"max_gen_toks": 3}
    good = lm_eval_data.task(tmp_path / "tasks", "good", pairs, **plain, generation_kwargs=short,
                             metric_list=[{"metric": "bleu"}])  # fmt: skip
    lm_eval_data.task(tmp_path / "tasks", "field", pairs, **{**plain, "doc_to_text": "{{nowhere.at.all}}"})
    lm_eval_data.task(tmp_path / "tasks", "argument", pairs, **plain, generation_kwargs={"penalty_alpha": 3})
    lm_eval_data.task(tmp_path / "tasks", "unsafe", pairs, **plain, unsafe_code=True)
    lm_eval_data.task(tmp_path / "tasks", "long", [{"text": "a", "target": "old " * 80}], doc_to_text="{{text}}",
                      doc_to_target="{{target}}", output_type="loglikelihood")  # fmt: skip
    (tmp_path / "tasks/data/long.jsonl").rename(tmp_path / "moved")
    late = lm_eval_data.task(tmp_path / "tasks", "late", pairs, **plain, generation_kwargs=short,
                             process_results="late")  # fmt: skip
    (tmp_path / "tasks/late.py").write_text("def judge(doc, results):\n    raise RuntimeError('no\\nverdict')\n")
    late.write_text(late.read_text().replace('"late"}', "!function late.judge }"))
    wrong = {
        "hellaswagg": "neither a task of lm-eval nor a file of one: did you mean hellaswag?",
        "field": "UndefinedError: 'nowhere' is undefined",
        "argument": "penalty_alpha is no argument of generation here",
        "unsafe": "unsafe runs code that the model writes: use `lm_eval",
        "long": "FileNotFoundError",
        "late": "RuntimeError: no\n",
    }
    out, include = tmp_path / "out", ["--include", tmp_path / "tasks"]
    code, output, errors = run("--tasks", ",".join(wrong), good, *include, "--out", out)
    assert code == 4 and errors.endswith(f"failed: {len(wrong)} tasks could not be evaluated\n"), errors
    for name, words in wrong.items():
        (line,) = [f"{line}\n" for line in errors.splitlines() if line.startswith(f"failed: {name}")]
        assert words in line
    tasks = read(out)
    assert [*tasks] == ["good"] and output.startswith("good\tall\twhole/bleu\t")
    assert tasks["good"]["files"][0]["measures"]["whole/bleu"]["low"] is None
    assert len(json.loads((out / "results.json").read_text())["failures"]) == len(wrong)
    assert run("--tasks", "hellaswagg", "--out", tmp_path / "none")[0] == 4 and not (tmp_path / "none").exists()


def test_flags_that_are_wrong(folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for arguments, words in (
        (["--include=nowhere"], "--include nowhere is no folder"),
        (["--data=x"], "--data is not for tasks of lm-eval"),
        (["--noharness", "--unidirectional"], "--unidirectional is for tasks of lm-eval: add --harness"),
        (["--noharness", f"--include={tmp_path}"], "--include is for tasks of lm-eval: add --harness"),
    ):
        code, _, errors = run("--tasks=x", *arguments)
        assert code == 2 and errors.startswith(f"error: {words}") and errors.count("\n") == 1
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "lm_eval" else find(name))
    code, _, errors = run("--tasks=x")
    assert code == 2 and errors == "error: --harness needs the package lm-eval: pip install -e '.[harness]'\n"


@pytest.mark.slow
def test_an_interrupted_evaluation_resumes(
    folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Interrupted in its second task, it keeps the responses of the first, and says what it says in one go."""
    arguments = ["--tasks", "local_piqa,local_triviaqa", "--include", folder / "tasks", "--unidirectional", "--out"]
    assert run(*arguments, tmp_path / "whole")[0] == 0

    def interrupted(*_: object) -> Any:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(lm_eval_requests.Continuations, "run", interrupted)
        assert run(*arguments, tmp_path / "out")[0] == 130
    code, _, errors = run("--tasks", "local_piqa,local_triviaqa", "--include", folder / "tasks", "--out",
                          tmp_path / "out")  # fmt: skip
    assert code == 2 and "was begun with other tasks" in errors  # read in both directions
    asked = list[int]()
    original = lm_eval_requests.Likelihoods.run
    monkeypatch.setattr(lm_eval_requests.Likelihoods, "run", lambda self, numbers: (
        asked.extend(numbers), original(self, numbers))[1])  # fmt: skip
    assert run(*arguments, tmp_path / "out")[0] == 0 and not asked
    assert json.loads((tmp_path / "out/results.json").read_text())["resumed"] == 2 * lm_eval_data.DOCUMENTS
    first, second = (results.read_items(tmp_path / name) for name in ("whole", "out"))
    assert first.keys() == second.keys()
    for key, columns in first.items():
        np.testing.assert_array_equal(columns, second[key])


@pytest.mark.slow
def test_its_command_line_runs_our_model(folder: Path, tmp_path: Path) -> None:
    model = f"workdir={folder / 'run'},unidirectional=True"
    command = [sys.executable, "-m", "glm_jax.evaluation.lm_eval_model", "run", "--model", "glm-jax", "--model_args",
               model, "--include_path", str(folder / "tasks"), "--tasks", "local_copa", "--output_path",
               str(tmp_path / "out.json")]  # fmt: skip
    done = subprocess.run(command, cwd=ROOT, text=True, capture_output=True, timeout=HANG)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "|local_copa|" in done.stdout
    assert "contexts keep only their end" in done.stderr
