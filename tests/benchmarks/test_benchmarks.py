"""Every benchmark runs, and compares what it says: tiny, its sides one after another in this process."""

import argparse
import importlib
import json
import math
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest

BENCHMARKS = Path(__file__).parents[2] / "benchmarks"
TINY = ["--layers=1", "--hidden=32", "--heads=2", "--vocabulary=64", "--rounds=1"]
COMMANDS = {
    "train": [*TINY, "--ffn=40", "--rows=2", "--length=64"],
    "decode": [*TINY, "--ffn=40", "--rows=2", "--context=16", "--new=4"],
    "attention": ["--rounds=1", "--rows=2", "--length=64", "--dim=16"],
    "engine": [
        *TINY,
        "--ffn=40",
        "--rows=2",
        "--length=64",
        "--microbatches=1",
        "--mesh=1,1,1",
        "--choices=layer:1f1b",
    ],
    "data": ["--rounds=1", "--documents=60", "--records=25", "--rows=4", "--length=128", "--batches=2"],
    "corpus": ["--rounds=1", "--documents=10", "--words=60"],
    "convert": [*TINY],
    "compile": ["--rounds=1", "--depths", "1", "2"],
    "sweep_vmapped": ["--rounds=1", "--steps=2", "--warm-rounds=1"],
}


@pytest.fixture
def load(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that imports a benchmark. The sides have one turn each, in this process."""
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    rounds, machine = map(importlib.import_module, ("rounds", "machine"))

    def measure(sides: Sequence[Any], count: int) -> dict[str, Any]:
        assert count == 1
        measured = {}
        for side in sides:
            served: list[Any] = []
            monkeypatch.setattr(rounds, "serve", lambda turn, about=dict, warm=True, served=served: served.append(
                rounds.Measured([rounds.Turn(2e-3, 1e-3, turn(), 0)], about())))  # fmt: skip
            _, script, *words = side.command
            importlib.import_module(Path(script).stem).main(words)
            (measured[side.name],) = served
        return measured

    monkeypatch.setattr(rounds, "measure", measure)
    monkeypatch.setattr(machine, "SIZE", 8)
    monkeypatch.setattr(machine, "NUMBERS", 8)
    yield importlib.import_module
    for name, module in list(sys.modules.items()):
        if Path(getattr(module, "__file__", None) or "/").parent == BENCHMARKS:
            del sys.modules[name]


@pytest.mark.slow
@pytest.mark.parametrize("name", COMMANDS)
def test_runs(name: str, load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark: ModuleType = load(name)
    if name == "data":
        for flag, value in {"layers": 1, "hidden": 8, "heads": 2, "ffn": 8, "vocabulary": 64, "length": 64}.items():
            monkeypatch.setitem(benchmark.STEP, flag, value)
    if name == "sweep_vmapped":  # whose processes would take longer than all the rest
        started: list[str] = []
        monkeypatch.setattr(benchmark, "AXES", {"seed": (1, 2)})
        monkeypatch.setattr(benchmark.subprocess, "run", lambda command, input, **rest: started.append(input))
        assert benchmark.main(COMMANDS[name]) == 1  # all turns took the same time, which is below the goal
        assert [len(json.loads(job)["members"]) for job in started] == [2, 1, 1]
    else:
        assert not benchmark.main(COMMANDS[name])
    lines = capsys.readouterr().out.splitlines()
    assert any(" of the CPU seconds" in line for line in lines) or name == "train"
    assert not any("nan" in line or "inf " in line for line in lines)


@pytest.mark.slow
def test_accelerator(load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    benchmark = load("accelerator")
    monkeypatch.setitem(benchmark.MODELS, "350m", {"layers": 1, "hidden": 32, "heads": 2, "ffn": 40, "vocabulary": 64})
    benchmark.main(["--rounds=1", "--rows=2", "--length=256", "--compute=float32"])
    _, first, second, ratio = capsys.readouterr().out.splitlines()
    assert first.startswith("attention blockwise: ") and "MFU" in first and second.startswith("attention reference: ")
    assert ratio.startswith("reference / blockwise: ")


def test_slots_are_what_a_microbatch_more_takes(
    load: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    benchmark = load("accelerator")
    # one step of 2 microbatches takes 5 s and of 4 takes 8 s: 1.5 s each, and 2 s of 5 are no microbatch's
    seconds = {2: 5.0, 4: 8.0}
    monkeypatch.setattr(benchmark, "stepper", lambda options, core: lambda: seconds[options.microbatches])
    monkeypatch.setattr(benchmark, "cores", lambda options: ["reference"])
    benchmark.report_slots(argparse.Namespace(mesh="1,2,1", schedule="1f1b", microbatches=2, rows=2, rounds=1))
    assert capsys.readouterr().out == (
        "2 stages, 2 microbatches: 1500.0 (1500.0 to 1500.0) ms a microbatch forward and backward, "
        "the rest 40.0 (40.0 to 40.0)% of a step; idle by the schedule 33.3%\n"
    )


def test_all_are_here() -> None:
    others = {"rounds", "machine", "shared", "official_torch", "start", "accelerator"}
    assert {path.stem for path in BENCHMARKS.glob("*.py")} <= {*COMMANDS} | others


def test_sides_are_processes_that_take_turns(load: Any, tmp_path: Path) -> None:
    script = tmp_path / "side.py"
    script.write_text(
        "import sys\nfrom pathlib import Path\n"
        f"sys.path.insert(0, {str(BENCHMARKS)!r})\nimport rounds\n"
        "def turn():\n"
        "    with open(Path(__file__).with_name('log'), 'a') as log:\n"
        "        print(sys.argv[1], file=log)\n"
        "    return rounds.clock('work', lambda: sum(range(10**6)))\n"
        "rounds.serve(turn, lambda: {'name': sys.argv[1]}, warm='warm' in sys.argv)\n"
    )
    monkeyed: Any = importlib.reload(load("rounds"))  # with its own `measure`
    sides = [monkeyed.script(name, str(script), name, *more) for name, more in (("a", ["warm"]), ("b", []))]
    monkeyed.QUIET = math.inf
    measured = monkeyed.measure(sides, 3)
    # a side that is warm has a turn before the first round, and one before each that counts
    assert (tmp_path / "log").read_text().split() == [*"a", *"aab", *"baa", *"aab"]
    for name, side in measured.items():
        assert side.about == {"name": name} and len(side.turns) == 3
        assert all(0 < part <= wall for part, wall in zip(side.seconds("work"), side.seconds(), strict=True))
        assert all(0 < cpu < 10 for cpu in side.cpu_seconds())
    line = monkeyed.compare(measured, "a", "b", "work")
    assert line.startswith("a / b, work: ") and line.endswith(" of the CPU seconds")


def test_the_time_of_a_finished_process_counts(load: Any) -> None:
    rounds = load("rounds")
    before = rounds.cpu_time()
    subprocess.run([sys.executable, "-c", "sum(range(5 * 10**6))"], check=True)
    assert rounds.cpu_time() - before > 0.02


def test_plain_reading_takes_each_document_once_an_epoch(load: Any) -> None:
    data = load("data")
    documents = [np.arange(start, start + 7) for start in range(0, 70, 7)]
    batches = data.read_batches(documents, 2, 5)
    run = np.concatenate([next(batches).reshape(-1) for _ in range(14)])
    for epoch in (run[:70], run[70:]):
        assert (np.sort(epoch) == np.arange(70)).all() and not (epoch == np.arange(70)).all()
