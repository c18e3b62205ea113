"""Signals to commands that do not train: one line, exit code 130, and no file half-written, at any moment.

test_stopping.py in tests/training/ is about runs.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from glm_jax import signals
from glm_jax.cli import main
from glm_jax.sweeps import run as sweeping
from tests.cli import scripted
from tests.end_to_end.runs import in_process
from tests.end_to_end.test_convert_command import GOLDENS, config
from tests.patience import HANG

__all__ = ["config"]  # a fixture

pytestmark = in_process

INT, TERM, HUP, USR1 = signals.ENDING
REQUESTS = [(INT,), (TERM,), (HUP, HUP), (USR1, TERM), (INT, INT)]
BETWEEN = ("fsync", "replace", "unlink")  # signals come before and after each of these


@pytest.fixture(autouse=True)
def heard() -> Iterator[None]:
    """No signal is ignored, as it would be under nohup."""
    found = [signal.signal(number, signal.default_int_handler) for number in signals.ENDING]
    yield
    for number, handler in zip(signals.ENDING, found, strict=True):
        signal.signal(number, handler)


class Moments:
    """Counts the moments before and after what a command does to files, and sends signals at one of them.

    The first signal of several makes the command tidy up; the next comes at the next moment.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.at = 0, sys.maxsize
        self.numbers: list[int] = []
        for name in BETWEEN:
            monkeypatch.setattr(os, name, self.around(getattr(os, name)))

    def around(self, function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any, **named: Any) -> Any:
            self.reached()
            result = function(*arguments, **named)
            self.reached()
            return result

        return call

    def reached(self) -> None:
        self.count += 1
        if self.count > self.at and self.numbers:
            os.kill(os.getpid(), self.numbers.pop(0))

    def run(self, arguments: list[str], at: int = sys.maxsize, numbers: tuple[int, ...] = ()) -> int:
        self.count, self.at, self.numbers = 0, at, list(numbers)
        return main.main(arguments)


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> Moments:
    return Moments(monkeypatch)


def content(folder: Path) -> dict[str, bytes]:
    """Return the files of a folder but for locks, by path."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.name.endswith(".lock")]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


def arguments_of(command: str, config: list[str], experiment: Path, folder: Path) -> list[str]:
    """Return a command that writes its files into a folder of its own."""
    folder.mkdir()
    if command == "corpus build":
        return ["corpus", "build", f"--config={experiment}", f"--config.data.cache={folder}", "--workers=1"]
    if command == "report":
        (folder / "metrics.jsonl").write_text(json.dumps({"event": "train", "step": 1, "samples": 1, "loss": 3.0}))
        return ["report", f"--workdir={folder}"]
    return ["convert", "sat-to-orbax", *config, f"--path={GOLDENS / 'ckpt_tp1'}", f"--out={folder / 'checkpoints'}"]


@pytest.mark.slow
@pytest.mark.parametrize("command", ["corpus build", "convert", "report"])
def test_a_signal_ends_a_command_in_one_line_and_leaves_no_file_half_written(
    command: str, config: list[str], experiment: Path, moments: Moments, tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    whole = tmp_path / "whole"
    assert moments.run(arguments_of(command, config, experiment, whole)) == 0
    expected, count = content(whole), moments.count
    assert count >= 2
    for at in range(0, count, max(1, count // 7)):
        numbers, folder = REQUESTS[at % len(REQUESTS)], tmp_path / f"at{at}"
        arguments = arguments_of(command, config, experiment, folder)
        capfd.readouterr()
        assert moments.run(arguments, at, numbers) == signals.INTERRUPTED
        said = capfd.readouterr().err.splitlines()
        assert said[-1] == signals.LINE and "Traceback" not in "".join(said), said
        left = {name for name in content(folder) if ".building/" not in name}  # where a build resumes
        assert left <= expected.keys(), (at, numbers)
        assert not [name for name in content(folder) if Path(name).name.startswith(".")], (at, numbers)
        if command == "corpus build":
            assert moments.run(arguments) == 0 and content(folder).keys() == expected.keys(), (at, numbers)


@pytest.mark.parametrize("number", signals.ENDING)
def test_generate_is_interrupted(
    number: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    scripted.install(monkeypatch, scripted.kill(number, "y"))
    assert main.main(["generate", "--workdir=x", "--prompt=y"]) == signals.INTERRUPTED
    assert capsys.readouterr() == ("", f"{signals.LINE}\n")


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_sweep_is_interrupted_before_it_trains(
    number: int, experiment: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sweeping, "_prepare", lambda *_: os.kill(os.getpid(), number))
    ablation = tmp_path / "ablation.py"
    ablation.write_text(experiment.read_text("utf-8") + "\n\ndef get_sweep():\n    return {'seed': (1, 2)}\n", "utf-8")
    command = ["sweep", f"--config={ablation}", f"--workdir={tmp_path / 'sweep'}"]
    assert main.main(command) == signals.INTERRUPTED
    assert capsys.readouterr().err.splitlines() == [signals.LINE] and not (tmp_path / "sweep").exists()


def test_the_first_signal_interrupts_the_second_waits_and_the_third_ends_the_process(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    left: list[str] = []
    monkeypatch.setattr(signals, "leave", lambda: left.append("left"))
    interrupt = signals.Interrupt()
    with pytest.raises(KeyboardInterrupt):
        interrupt(INT, None)
    interrupt(TERM, None)
    assert left == []
    interrupt(INT, None)
    assert left == ["left"]


IMPORTS = """
import os, sys
from glm_jax.__main__ import main

class Finder:
    def find_spec(self, name, *_):
        if name == {module!r}:
            os.kill(os.getpid(), {number})

sys.meta_path.insert(0, Finder())
sys.argv = ["glm-jax", *{arguments!r}]
main()
"""
AT_EXIT = """
import atexit, os, sys
from glm_jax.__main__ import main

atexit.register(lambda: os.kill(os.getpid(), {number}))
sys.argv = ["glm-jax", {argument!r}]
main()
"""


def process(environment: dict[str, str], code: str) -> tuple[int, list[str]]:
    """Run Python, and return its exit code and the lines of its standard error."""
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True,
        timeout=HANG,
    )  # fmt: skip
    return done.returncode, done.stderr.splitlines()


@pytest.mark.slow
@pytest.mark.parametrize(
    "module, number", [("absl", INT), ("absl.flags", TERM), ("jax", HUP), ("jaxlib._jax", INT), ("orbax", USR1)]
)
def test_a_signal_while_modules_are_imported_ends_the_process_in_one_line(
    module: str, number: int, environment: dict[str, str], experiment: Path, tmp_path: Path
) -> None:
    arguments = ["train", f"--config={experiment}", f"--workdir={tmp_path / 'run'}"]
    ended = process(environment, IMPORTS.format(module=module, number=int(number), arguments=arguments))
    assert ended == (signals.INTERRUPTED, [signals.LINE])


@pytest.mark.parametrize("argument, number, code", [("--version", INT, 0), ("nothing", TERM, 2)])
def test_a_signal_while_python_exits_changes_nothing(
    argument: str, number: int, code: int, environment: dict[str, str]
) -> None:
    ended, said = process(environment, AT_EXIT.format(argument=argument, number=int(number)))
    assert ended == code and len(said) == (code > 0) and "Traceback" not in "".join(said)
