"""`glm-jax generate --input`: forms of prompts and results, what is refused, and files that resume."""

import io
import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import jax
import pytest

from glm_jax import signals
from glm_jax.cli import generate_batch, journal, main, progress
from glm_jax.cli.journal import Journal
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
from glm_jax.inference import Model, batch
from glm_jax.model import GLMConfig, init
from tests.cli import scripted
from tests.cli.scripted import Scripted
from tests.patience import HANG

TEXTS = ["a [MASK]", "longer [MASK]", "a [MASK]", "c", "a [MASK]"]
FILLED = ["a <a0>", "longer <l0>", "a <a1>", "c", "a <a2>"]  # equal prompts are counted


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> Scripted:
    monkeypatch.setattr(batch, "ROWS", 2)  # prompts that are filled together
    return scripted.install(monkeypatch)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    scripted.workdir(tmp_path)
    (tmp_path / "in.txt").write_text("\n".join(TEXTS) + "\n")
    return tmp_path


Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def run(folder: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """Return a function that runs the command in the folder, and returns its exit code and what it printed."""
    monkeypatch.chdir(folder)

    def call(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main.main(["generate", "--workdir=run", *arguments])
        output, errors = capsys.readouterr()
        return code, output, errors

    return call


def stdin(monkeypatch: pytest.MonkeyPatch, content: bytes) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content)))


@pytest.mark.parametrize(
    "name, content, lines",
    [
        ("in.txt", "a [MASK]\n\n  \nb\n", ["a <a0>", "b"]),
        ("in.txt", "\ufeffa [MASK]\r\nb", ["a <a0>", "b"]),
        ("in.txt", "7\ta\tb [MASK]\nc\nx y\t中\\n [MASK]\n", ["7\ta\\tb <a0>", "c", "x y\t中\\n <中0>"]),
        ("in.jsonl", '{"id": 7, "prompt": "a [MASK]", "text": "b"}\n\n{"text": "c"}\n', [("id", 7), ("line", 3)]),
        ("in", '\n {"id": "x", "prompt": "a [MASK]"}\n', [("id", "x")]),
    ],
)
def test_results_have_the_form_of_the_prompts(
    name: str, content: str, lines: list[Any], model: Scripted, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    blank = sum(not line.strip() for line in content.removesuffix("\n").split("\n"))
    told = f"{blank} blank line{'s are' if blank > 1 else ' is'} skipped\n" if blank else ""
    Path(name).write_bytes(content.encode())
    code, output, errors = run(f"--input={name}")
    assert (code, errors) == (0, told) and output.endswith("\n")
    found = output[:-1].split("\n")
    if name == "in.txt":
        assert found == lines
    else:
        assert [next(iter(json.loads(line).items())) for line in found] == lines
        assert json.loads(found[0])["text"] == "a <a0>"
    assert run(f"--input={name}", "--output=deep/out") == (0, "", f"{told}written: deep/out\n")
    assert Path("deep/out").read_bytes().decode() == output and os.listdir("deep") == ["out"]
    if name != "in.jsonl":  # standard input has no name
        for flags in ([], ["--input=-"]):
            stdin(monkeypatch, content.encode())
            assert run(*flags) == (0, output, told)


def test_ends_of_lines_and_control_characters_stay_in_a_line(model: Scripted, run: Run) -> None:
    model.answer = lambda text, repeat: "1\n2\r\x1b[2J\u2028"
    assert run("--input=in.txt")[1].split("\n")[0] == r"a 1\n2\r\x1b[2J\u2028"
    first = json.loads(run("--input=in.txt", "--json")[1].split("\n")[0])
    assert first["line"] == 1 and first["text"] == "a 1\n2\r\x1b[2J\u2028"


@pytest.mark.parametrize(
    "name, content, said",
    [
        ("in.txt", b"", "in.txt holds no prompt"),
        ("in.txt", b" \n\n", "in.txt holds no prompt"),
        ("in.txt", b"a\n\xff\n", "in.txt line 2 is not valid UTF-8"),
        ("in.txt", b"a\n\tb\n", "in.txt line 2 begins with a tab"),
        ("in.txt", b"a\n\nx\t \n", "in.txt line 3: the prompt is empty"),
        ("in.jsonl", b"\n{]\n", "in.jsonl line 2 is not valid JSON (Expecting"),
        ("in.jsonl", b"[" * 100_000, "in.jsonl line 1 is nested too deeply"),
        ("in.jsonl", b'"a"', "in.jsonl line 1 is no object"),
        ("in.jsonl", b'{"Prompt": "a"}', "in.jsonl line 1 has neither prompt nor text"),
        ("in.jsonl", b'{"prompt": 3}', "in.jsonl line 1: prompt is no text"),
        ("in.jsonl", b'{"prompt": "a", "id": true}', "in.jsonl line 1: id is neither a text nor a whole number"),
    ],
)
def test_a_wrong_line_is_named(name: str, content: bytes, said: str, model: Scripted, run: Run) -> None:
    Path(name).write_bytes(content)
    before = sorted(os.listdir())
    code, output, errors = run(f"--input={name}", "--output=out")
    assert (code, output) == (2, "") and said in errors.splitlines()[-1] and errors.startswith(("error: ", "1 blank"))
    assert sorted(os.listdir()) == before


def test_files_that_cannot_be_used_are_one_line(model: Scripted, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    for name, reason in (("nowhere", "No such file"), ("run", "Is a directory"), ("in.txt/x", "Not a directory")):
        code, _, errors = run(f"--input={name}")
        assert code == 2 and errors.startswith(f"error: --input {name} cannot be read ({reason}")
    for name, reason in (("in.txt", "exists: remove it"), ("run", "exists"), ("in.txt/x", "cannot be written (")):
        code, _, errors = run("--input=in.txt", f"--output={name}")
        assert code == 2 and errors.startswith(f"error: --output {name} {reason}") and errors.count("\n") == 1
    monkeypatch.setattr(os, "access", lambda *_: False)
    assert "error: --output out cannot be written (. is not writable)" in run("--input=in.txt", "--output=out")[2]
    monkeypatch.setattr(sys, "stdin", None)
    assert run() == (2, "", "error: standard input is closed: give --prompt TEXT or --input FILE\n")
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(isatty=lambda: True))
    assert run("--output=out") == (2, "", "error: --output needs prompts: give --input FILE\n")
    assert not model.asked


def test_one_prompt_may_have_an_output_file(model: Scripted, run: Run) -> None:
    assert run("--prompt=a [MASK]", "--output=out") == (0, "", "written: out\n")
    assert Path("out").read_text() == "a <a0>\n"


@pytest.mark.parametrize("number", signals.ENDING)
def test_a_signal_stops_after_the_prompts_that_are_being_filled(number: int, model: Scripted, run: Run) -> None:
    expected = "".join(f"{line}\n" for line in FILLED)
    assert run("--input=in.txt")[1] == expected  # the longest is filled first, and the order is that of the input
    model.before, model.asked[:] = scripted.kill(number, "longer [MASK]"), []
    said = "stopped: 2 of 5 results are in out.part; the same command resumes from there\n"
    assert run("--input=in.txt", "--output=out") == (3, "", said)
    assert Path("out.part").read_text().split("\n")[1:] == ["1\tlonger <l0>", "0\ta <a0>", ""]
    with open("out.part", "a") as file:
        file.write("2\ta <a")  # killed while it wrote
    model.before = scripted.kill(number, "a [MASK]")
    said = "stopped: 4 of 5 results are in out.part; the same command resumes from there\n"
    assert run("--input=in.txt", "--output=out") == (3, "", said)
    assert Path("out.part").read_text().split("\n")[3:] == ["2\ta <a1>", "4\ta <a2>", ""]
    model.before = len
    assert run("--input=in.txt", "--output=out", "--mesh=data=2") == (0, "", "written: out\n")
    assert Path("out").read_text() == expected and not Path("out.part").exists()
    resumed = [(texts, repeats) for texts, _, repeats in model.asked[1:]]
    assert resumed == [(["a [MASK]", "c", "a [MASK]"], [1, 0, 2]), (["c"], [0])]


def test_a_second_interrupt_and_a_bad_start_leave_nothing(model: Scripted, run: Run) -> None:
    def twice(text: str) -> None:
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)

    model.before = twice
    assert run("--input=in.txt", "--output=out") == (signals.INTERRUPTED, "", f"{signals.LINE}\n")
    assert sorted(os.listdir()) == ["in.txt", "run"]


def begun(run: Run, model: Scripted) -> bytes:
    """Begin a file and stop; return what there is."""
    model.before = scripted.kill(signal.SIGTERM, "longer [MASK]")
    assert run("--input=in.txt", "--output=out")[0] == 3
    model.before = len
    return Path("out.part").read_bytes()


def test_a_file_resumes_only_as_it_was_begun(model: Scripted, run: Run) -> None:
    part = begun(run, model)
    for flags, said in (
        (["--seed=1"], "seed 1234, not 1"),
        (["--max_tokens=3"], "max_tokens 64, not 3"),
        (["--stop=x"], "stop [], not ['x']"),
        (["--strategy=sample"], "strategy greedy, not sample"),
        (["--json"], "form as_text, not as_json"),
        (["--ban=3"], "banned [], not [3]"),
        (["--quantize=int8"], "quantize None, not int8"),
    ):
        code, _, errors = run("--input=in.txt", "--output=out", *flags)
        assert code == 2 and errors.startswith(f"error: out.part was begun with {said}: repeat the command as it was")
    Path("in.txt").write_text("\n".join([*TEXTS[:-1], "other"]))
    assert "was begun with other prompts" in run("--input=in.txt", "--output=out")[2]
    Path("in.txt").write_text("\n" + "\n".join(TEXTS))  # their lines are in results without ids
    assert "was begun with other prompts" in run("--input=in.txt", "--output=out")[2]
    Path("in.txt").write_text("\n".join(TEXTS))
    model.decoder.config.compute = "float16"
    assert "was begun with dtype float32, not float16" in run("--input=in.txt", "--output=out")[2]
    model.decoder.config.compute = "float32"
    model.tokenizer = SimpleNamespace(digest="another")
    assert "was begun with other tokens" in run("--input=in.txt", "--output=out")[2]
    model.tokenizer = SimpleNamespace(digest="a tokenizer")
    weights = Path("run/checkpoints/5/params/weights")
    weights.write_text("2")
    assert "was begun with other weights" in run("--input=in.txt", "--output=out")[2]
    weights.write_text("1")
    model.step = 6
    assert "was begun with step 5, not 6" in run("--input=in.txt", "--output=out")[2]
    model.step = 5
    assert Path("out.part").read_bytes() == part and len(model.asked) == 1
    assert run("--input=in.txt", "--output=out")[0] == 0


@pytest.mark.parametrize(
    "content", [b"my own notes\n", b"no line", b"[1]\n", b"{}\n", b"\xff\n", b"HEADERx\ty\n", b"HEADERnone\n"]
)
def test_another_file_of_that_name_is_left_alone(content: bytes, model: Scripted, run: Run) -> None:
    header = begun(run, model).split(b"\n")[0] + b"\n"
    content = content.replace(b"HEADER", header)
    Path("out.part").write_bytes(content)
    code, _, errors = run("--input=in.txt", "--output=out")
    assert code == 2 and "out.part is no journal of this command, or is damaged: remove it" in errors
    assert Path("out.part").read_bytes() == content
    Path("out.part").write_bytes(header[:20])  # killed while it wrote the header
    assert run("--input=in.txt", "--output=out")[0] == 0


def test_two_commands_do_not_write_one_file(folder: Path, model: Scripted, run: Run) -> None:
    header = {"prompts": {"digest": "0"}}
    journal = Journal(folder / "out.part", header)
    code, _, errors = run("--input=in.txt", "--output=out")
    assert code == 2 and errors.startswith("error: another command is writing out.part") and not model.asked
    assert (folder / "out.part").exists()
    journal.close()
    assert run("--input=in.txt", "--output=out")[0] == 0


def test_a_full_disk_is_one_line(model: Scripted, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    real, calls = os.fsync, list[int]()

    def full(descriptor: int) -> None:
        calls.append(descriptor)
        if len(calls) == 3:  # the header, a block, a block
            raise OSError(28, os.strerror(28))
        real(descriptor)

    monkeypatch.setattr(os, "fsync", full)
    code, _, errors = run("--input=in.txt", "--output=out")
    assert code == 2 and errors == (
        "error: out.part cannot be written (No space left on device): make room, and the same command resumes\n"
    )
    assert run("--input=in.txt", "--output=out") == (0, "", "written: out\n")
    assert Path("out").read_text().split("\n")[:-1] == FILLED


KILLED = """
import os, signal, sys
from pathlib import Path
import pytest
from glm_jax.cli import main
from glm_jax.inference import batch
from tests.cli import scripted

with pytest.MonkeyPatch.context() as patch:
    patch.setattr(batch, "ROWS", 2)
    scripted.install(patch, scripted.kill(signal.SIGKILL, "c"))
    sys.exit(main.main(["generate", "--workdir=run", "--input=in.txt", "--output=out"]))
"""


@pytest.mark.slow
def test_a_killed_file_resumes(folder: Path, model: Scripted, run: Run) -> None:
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    command = [sys.executable, "-c", KILLED]
    killed = subprocess.run(command, cwd=folder, env=environment, capture_output=True, timeout=HANG)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    assert (folder / "out.part").read_bytes().count(b"\n") == 5  # the header and four results; "c" is the shortest
    assert run("--input=in.txt", "--output=out") == (0, "", "written: out\n")
    assert (folder / "out").read_text().split("\n")[:-1] == FILLED and model.asked[0][0] == ["c"]


def test_processes_stop_together_and_agree_on_what_is_done(
    model: Scripted, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process sees what the first has written, and writes nothing."""
    part = begun(run, model)
    monkeypatch.setattr("glm_jax.parallel.processes.is_first", lambda: False)
    for module in (generate_batch, journal):
        monkeypatch.setattr(module, "everyone", lambda text: [text, text and "stop"])
    code, output, errors = run("--input=in.txt", "--output=out")
    assert (code, output) == (2, "") and "the processes see different contents of out.part" in errors
    for module in (generate_batch, journal):
        monkeypatch.setattr(module, "everyone", lambda text: [text, "stop"] if text in ("", "stop") else [text])
    assert run("--input=in.txt", "--output=out") == (3, "", "")
    assert model.asked[-1][0] == ["a [MASK]", "c", "a [MASK]"] and Path("out.part").read_bytes() == part


def test_progress_is_a_line_now_and_then(model: Scripted, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10_000, 20))  # 20 s for two prompts
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    code, _, errors = run("--input=in.txt")
    assert code == 0
    (line,) = errors.splitlines()  # after 40 s; the file ends at 60
    assert line[9:] == "4/5 prompts, 0 tok/s, 00:10 left"


@pytest.mark.slow
def test_a_file_in_parts_gives_what_the_whole_gives(folder: Path, run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    """A real model that draws: neither blocks, nor their order, nor a stop in between shows in the results."""
    tokenizer = SentencePieceTokenizer(train(["the small array returns a new shape", "天下大势"] * 20, 330))
    cfg = GLMConfig(1, 24, 2, 32, 336, max_length=64)
    model = Model(cfg, init(cfg, jax.random.key(0)), tokenizer, source="step 5 of run")
    model.step = 5
    monkeypatch.setattr(batch, "ROWS", 2)
    texts = ["the [MASK]", "a new [MASK]", "the [MASK]", "天下[MASK]", "the [MASK]", "a [MASK]"]
    whole = model.fill(texts, "sample", max_tokens=3, seed=5)
    assert len({filled.text for filled in whole}) == 6
    Path("in.jsonl").write_text("".join(json.dumps({"prompt": text}) + "\n" for text in texts))
    monkeypatch.setattr(Model, "open", lambda *_: model)
    monkeypatch.setattr("glm_jax.cli.generate_flags.check_workdir", lambda values: None)
    command = ["--input=in.jsonl", "--output=out", "--strategy=sample", "--max_tokens=3", "--seed=5", "--top_p=1"]
    Path("bad.txt").write_text("the\n" + "the small " * 40)
    assert "error: bad.txt line 2: the prompt has " in run("--input=bad.txt")[2]
    fill_each, stop = model.fill_each, [signal.SIGTERM]

    def interrupted(*arguments: Any, **named: Any) -> Any:
        for found in fill_each(*arguments, **named):
            if stop:
                os.kill(os.getpid(), stop.pop())
            yield found

    monkeypatch.setattr(model, "fill_each", interrupted)
    assert run(*command)[0] == 3 and run(*command)[0] == 0
    found = [json.loads(line) for line in Path("out").read_text().splitlines()]
    assert [one["text"] for one in found] == [filled.text for filled in whole]
    expected = [[fill._asdict() for fill in filled.fills] for filled in whole]
    assert [one["fills"] for one in found] == json.loads(json.dumps(expected))
