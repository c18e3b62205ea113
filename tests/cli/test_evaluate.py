"""`glm-jax evaluate` and `compare`: a folder in the official form, end to end; what is wrong; what is killed."""

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.cli import main
from glm_jax.evaluation import results, score
from tests.evaluation import official_form
from tests.patience import HANG

Run = Callable[..., tuple[int, str, str]]
NAMES = ["WikiText-2", "WikiText-2 left to right", "beams", "causal", "choices", "CROWS", "greedy",
         "LAMBADA-unidirectional", "LAMBADA", "MMLU", "Pile", "StereoSet", "tokens"]  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("evaluation")
    official_form.workdir(made)
    official_form.write(made)
    return made


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str]) -> Run:
    def call(command: str, *arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        model = [f"--workdir={folder / 'run'}"] if command == "evaluate" else []
        code = main.main([command, *model, *map(str, arguments)])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


class Page(HTMLParser):
    """Checks that elements are closed in order, and that nothing is loaded from elsewhere."""

    EMPTY = ("meta", "br")

    def __init__(self, text: str) -> None:
        super().__init__()
        self.opened, self.seen = list[str](), list[str]()
        self.feed(text)
        assert not self.opened

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        assert not {
            name for name, value in attrs if name in ("src", "href", "xlink:href") and value and value[0] != "#"
        }
        self.seen.append(tag)
        if tag not in self.EMPTY:
            self.opened.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.opened.pop() == tag


@pytest.mark.slow
def test_a_task_folder_in_the_official_form_runs_unchanged(folder: Path, run: Run) -> None:
    code, output, errors = run("evaluate", "--tasks", folder / "tasks", "--out", folder / "out")
    assert code == 0, errors
    assert sorted(os.listdir(folder / "out")) == ["index.html", "items.jsonl", "results.json", "results.md"]
    found = json.loads((folder / "out/results.json").read_text())
    assert [task["name"] for task in found["tasks"]] == NAMES and found["failures"] == []
    tasks = {task["name"]: task for task in found["tasks"]}
    # counted by hand from what official_form writes
    sizes = {(file["group"], file["file"]): file["items"] for file in tasks["choices"]["files"]}
    assert sizes == {("validation", "prompt_1/val.jsonl"): 5, ("validation", "prompt_2/val.jsonl"): 5,
                     ("test", "prompt_1/test.jsonl"): 3, ("test", "prompt_2/test.jsonl"): 3}  # fmt: skip
    assert [file["truncated"] for file in tasks["tokens"]["files"]] == [2] and tasks["LAMBADA"]["paper"]
    assert set(tasks["tokens"]["files"][0]["measures"]) == {"Accuracy", "F1_mul"}
    assert set(tasks["choices"]["groups"]) == {"validation", "test", "overall"}
    assert "choices\tvalidation\tAccuracy\t" in output
    for task in tasks.values():
        for group, summaries in task["groups"].items():
            files = [file for file in task["files"] if group in (file["group"], "overall")]
            for name, one in summaries.items():
                values = [file["measures"][name]["value"] for file in files]
                weighted = np.average(values, weights=[file["items"] for file in files])
                assert one == {"files": len(files), "highest": max(values), "median": np.median(values),
                               "mean": pytest.approx(np.mean(values)), "weighted": pytest.approx(weighted)}  # fmt: skip
    page = Page((folder / "out/index.html").read_text())
    assert page.seen.count("table") > len(NAMES) and "svg" in page.seen
    table = (folder / "out/results.md").read_text()
    assert "| test | prompt_2/test.jsonl | Accuracy |" in table and "tokens a second" in table
    code, output, _ = run("compare", folder / "out", folder / "out")
    assert code == 0 and len(output.splitlines()) > len(NAMES) and output.count("1.0000") >= len(NAMES)  # p


def test_what_is_wrong_is_named_and_the_other_tasks_run(folder: Path, run: Run, tmp_path: Path) -> None:
    data = tmp_path / "data"
    official_form.task(tmp_path / "tasks", "good", "name: good\ntype: mul\npath: good\nold_key: 3\n")
    right = {"inputs_pretokenized": "the", "choices_pretokenized": ["array", "house"], "label": 1}
    official_form.jsonl(data / "good/a.jsonl", [right])
    wrong: dict[str, tuple[dict[str, Any], str]] = {
        "label": ({**right, "label": 2}, "label is 2: there are 2 choices, so it must be 0 to 1"),
        "field": ({"inputs_pretokenized": "a", "choices_pretokenized": ["b"]}, "label is missing"),
        "inputs": ({"label": 0}, "inputs_pretokenized is missing"),
        "empty": ({**right, "choices_pretokenized": []}, "choices is empty"),
        "blank": ({**right, "choices_pretokenized": ["a", ""]}, "choices has an empty choice, number 2"),
        "token": ({**right, "inputs": [9999]}, "inputs has token 9999: the vocabulary has 0 to"),
        "long": ({**right, "choices_pretokenized": ["the small array " * 30, "a"]}, "leave no room for a context"),
    }
    for name, (record, _) in wrong.items():
        official_form.task(tmp_path / "tasks", name, f"name: {name}\ntype: mul\npath: {name}\n")
        official_form.jsonl(data / name / "a.jsonl", [right, record])
    files = {
        "kind": ("name: x\ntype: mull\npath: x\n", "line 2: type is 'mull': it must be one of mul, gen, lm"),
        "path": ("name: x\ntype: mul\n", "line 1: path is missing"),
        "yaml": ("name: x\ntype: [\n", "line 3 is not valid YAML"),
        "module": ("name: x\ntype: gen\nmodule: a.Lambada\npath: x\n", "line 3: module names Lambada, which is "
                   "unknown: it must be one of MMLU"),
        "blind": ("name: x\ntype: mul\npath: x\nunidirectional: true\n", "line 4: unidirectional needs use_task_mask"),
        "twice": ("name: x\ntype: mul\npath: x\nuse-task-mask: true\nuse_task_mask: no\n",
                  "line 5: use_task_mask is given twice"),
        "none": ("name: x\ntype: mul\npath: nowhere\n", "file_pattern **/*.json* matches no file below"),
        "room": ("name: x\ntype: gen\npath: gen\n", "answers of 128 tokens leave no room"),
    }  # fmt: skip
    official_form.jsonl(data / "gen/a.jsonl", [{"inputs_pretokenized": "the", "targets_pretokenized": ["a"]}])
    for name, (text, _) in files.items():
        official_form.task(tmp_path / "tasks", name, text)
    out = tmp_path / "out"
    code, output, errors = run("evaluate", "--tasks", tmp_path / "tasks", "nonsense", "--data", data, "--out", out)
    assert code == 4 and errors.endswith(f"failed: {len(wrong) + len(files) + 1} tasks could not be evaluated\n")
    for name, (_, words) in wrong.items():
        assert f"failed: {data / name / 'a.jsonl'}, line 2: {words}" in errors or (name == "long" and words in errors)
    for name, (_, words) in files.items():
        assert re.search(rf"failed: .*({name}\.yaml|gen/a\.jsonl).*{re.escape(words)}", errors), (name, errors)
    assert "failed: --tasks nonsense is neither a task file nor a folder" in errors
    assert f"{tmp_path / 'tasks/good.yaml'}: ignored, as no field of a task: old_key" in errors
    assert output.startswith("good\tall\tAccuracy\t")
    found = json.loads((out / "results.json").read_text())
    assert [task["name"] for task in found["tasks"]] == ["good"] and len(found["failures"]) == 16
    assert Page((out / "index.html").read_text()).seen.count("p") >= 16
    assert run("evaluate", "--tasks", "nonsense", "--out", tmp_path / "none")[0] == 4
    assert not (tmp_path / "none").exists()


@pytest.mark.slow
def test_a_killed_evaluation_resumes(folder: Path, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed after some results, it does only the others, and says what it says in one go."""
    asked = list[int]()
    arguments = ["--tasks", folder / "tasks/choices.yaml", folder / "tasks/greedy.yaml", "--out"]
    assert run("evaluate", *arguments, tmp_path / "whole")[0] == 0
    code = (
        "import os, signal, sys\n"
        "from glm_jax.cli import journal, main\n"
        "add, count = journal.Journal.add, []\n"
        "def killed(self, results):\n"
        "    add(self, results)\n"
        "    count.append(1)\n"
        "    if len(count) == 2: os.kill(os.getpid(), signal.SIGKILL)\n"
        "journal.Journal.add = killed\n"
        "main.main(sys.argv[1:])\n"
    )
    command = [sys.executable, "-c", code, "evaluate", f"--workdir={folder / 'run'}", *map(str, arguments)]
    killed = subprocess.run([*command, str(tmp_path / "killed")], capture_output=True, text=True, timeout=HANG,
                            cwd=Path(__file__).parent.parent.parent)  # fmt: skip
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (tmp_path / "killed/results.part").read_text().count("\n") == 1 + 10  # the header, and validation
    original = score.choices

    def counted(decoder: Any, tokenizer: Any, questions: Any, *more: Any, **options: Any) -> Any:
        asked.append(len(questions))
        return original(decoder, tokenizer, questions, *more, **options)

    monkeypatch.setattr(score, "choices", counted)
    assert run("evaluate", *arguments, tmp_path / "killed")[0] == 0
    assert sum(asked) == 16 - 10
    first, second = (results.read_items(tmp_path / name) for name in ("whole", "killed"))
    assert first.keys() == second.keys()
    for key, columns in first.items():
        np.testing.assert_array_equal(columns, second[key])
    assert json.loads((tmp_path / "killed/results.json").read_text())["resumed"] == 10
    other = [*arguments[:2], "--out", tmp_path / "other"]
    (tmp_path / "other").mkdir()
    header = {"tasks": {"digest": ""}, "tokens": {}, "weights": {}, "options": {}}
    (tmp_path / "other/results.part").write_text(json.dumps(header) + "\n")
    code, _, errors = run("evaluate", *other)
    assert code == 2 and "was begun with other tasks" in errors


def test_comparing_what_cannot_be_compared(run: Run, tmp_path: Path) -> None:
    code, _, errors = run("compare", tmp_path, tmp_path)
    assert code == 2 and "holds no finished evaluation" in errors
    for name, task in (("a", "x"), ("b", "y")):
        (tmp_path / name).mkdir()
        line = {"task": task, "group": "all", "file": "f", "measure": "Accuracy", "columns": [[1.0], [0.0]]}
        official_form.jsonl(tmp_path / name / "items.jsonl", [line])
    code, _, errors = run("compare", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "have no task in common" in errors
    line = {"task": "x", "group": "all", "file": "f", "measure": "Accuracy", "columns": [[1.0], [1.0]]}
    official_form.jsonl(tmp_path / "b" / "items.jsonl", [line, {**line, "task": "z"}])
    code, output, errors = run("compare", "--first", tmp_path / "a", "--second", tmp_path / "b")
    assert code == 0 and output.splitlines()[1].split()[:8] == ["x", "all", "f", "Accuracy", "2", "50.00", "100.00",
                                                                "50.00"]  # fmt: skip
    assert "not compared" in errors and "z, all, f, Accuracy" in errors
    assert run("compare", "a", "b", "c")[2].startswith("error: unexpected argument c: flags are written")
    assert run("compare", "a")[2].startswith("error: --second is missing")
    (tmp_path / "b/items.jsonl").write_text("[]\n")
    code, _, errors = run("compare", tmp_path / "a", tmp_path / "b")
    assert code == 2 and "is damaged" in errors


def test_examples_before_questions(folder: Path, run: Run, tmp_path: Path) -> None:
    arguments = ["--tasks", folder / "tasks/choices.yaml", folder / "tasks/crows.yaml", "--out", tmp_path, "--shots=2"]
    code, _, errors = run("evaluate", *arguments)
    assert code == 0, errors
    found = json.loads((tmp_path / "results.json").read_text())
    assert (found["model"]["shots"], found["model"]["seed"]) == (2, 1234)
    choices, crows = ({(file["shots"], file["dropped_examples"]) for file in task["files"]} for task in found["tasks"])
    assert {shots for shots, _ in choices} == {2} and crows == {(0, 0)}
    assert f"{folder / 'tasks/crows.yaml'}: --shots does not apply" in errors
    assert "| items | contexts cut | examples | examples dropped |" in (tmp_path / "results.md").read_text()
    assert "examples dropped</th>" in (tmp_path / "index.html").read_text()
    code, _, errors = run("evaluate", *arguments[:4], tmp_path / "many", "--shots=5")
    assert code == 4 and "--shots 5 needs as many other items" in errors
