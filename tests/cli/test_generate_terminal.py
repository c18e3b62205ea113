"""`glm-jax generate` for a person at a terminal: texts that grow, and the prompt line that stays open."""

import builtins
import importlib
import os
import pty
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
from prompt_toolkit.application import create_app_session
from prompt_toolkit.history import FileHistory
from prompt_toolkit.input import PipeInput, create_pipe_input

from glm_jax import signals
from glm_jax.cli import generate, main
from glm_jax.cli.generate_terminal import Stream
from glm_jax.inference.pending import Filled
from glm_jax.inference.prompts import Fill, Piece
from tests.cli import scripted
from tests.cli.scripted import Scripted
from tests.patience import HANG


def text(content: str) -> Piece:
    return Piece(content, ())


def blank(kind: str) -> Piece:
    return Piece(kind, (1,), blank=True)


def fill(content: str, size: int = 0) -> Piece:
    """Return a fill of `size` tokens."""
    tokens = tuple(range(size))
    return Piece(content, tokens, fill=Fill(content, tokens, (), "end"))


def streamed(rounds: list[list[Piece]], *, stop: tuple[str, ...] = (), styled: bool = False) -> list[str]:
    """Show the looks at a text and its end, and return what each printed."""
    written: list[str] = []
    stream, shown = Stream(stop, written.append, styled=styled), list[str]()
    for number, pieces in enumerate(rounds):
        if number < len(rounds) - 1:
            stream.watch(0, pieces)
        else:
            stream.finish(Filled(tuple(pieces)))
        shown.append("".join(written))
        written.clear()
    return shown


def test_a_fill_grows_and_the_rest_follows_at_the_end() -> None:
    parts = ("x", "xy", "xy", "xyz", "xyz")  # a look may show nothing new
    rounds = [[text("a "), fill(one, len(one)), text(" b")] for one in parts]
    assert streamed(rounds) == ["a x", "y", "", "z", " b\n"]
    assert streamed(rounds, styled=True)[1] == "\x1b[4my\x1b[0m"


def test_half_characters_wait() -> None:
    whole = "中\ufffd"  # the model may end in half a character
    parts = ["\ufffd", "\ufffd\ufffd", "中", "中\ufffd", whole]
    rounds = [[fill(one, size), text("!")] for size, one in enumerate(parts)]
    assert streamed(rounds) == ["", "", "中", "", "\ufffd!\n"]


def test_what_may_become_a_stop_string_waits() -> None:
    parts = ["a", "aE", "aEN", "aENd", "aENdEN", "aENd"]  # the last was cut before END
    rounds = [[fill(one, size)] for size, one in enumerate(parts)]
    assert streamed(rounds, stop=("END", "ENTER")) == ["a", "", "", "ENd", "", "\n"]


def test_blanks_that_are_filled_out_of_order_are_printed_in_order() -> None:
    """[MASK] before [gMASK], which stands before it: what follows the growing fill waits, too."""
    g, m = blank("[gMASK]"), blank("[MASK]")
    rounds = [
        [text("a "), fill("x", 1), text(" b "), g, text(" c "), m],
        [text("a "), fill("xy", 2), text(" b "), g, text(" c "), m],
        [text("a "), fill("xy", 2), text(" b "), g, text(" c "), fill("z", 1)],
        [text("a "), fill("xy", 2), text(" b "), g, text(" c "), fill("zz", 2)],
        [text("a "), fill("xy", 2), text(" b "), fill("g", 1), text(" c "), fill("zz", 2)],
        [text("a "), fill("xy", 2), text(" b "), fill("gh", 2), text(" c "), fill("zz", 2)],
        [text("a "), fill("xy", 2), text(" b "), fill("gh", 2), text(" c "), fill("zz", 2)],
    ]
    assert streamed(rounds) == ["a x", "y", " b ", "", "g", "h", " c zz\n"]


def test_a_text_that_changes_is_printed_again_and_escapes_stay_harmless() -> None:
    rounds = [[text("a"), fill(one, size)] for size, one in enumerate(("\x1b[2J", "b", "bc"))]
    assert streamed(rounds) == ["a\\x1b[2J", "", "\nabc\n"]


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Scripted:
    """Return a scripted model; a person is at a terminal."""
    monkeypatch.setattr(generate, "_is_terminal", lambda: True)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return scripted.install(monkeypatch)


@pytest.fixture
def keyboard() -> Iterator[PipeInput]:
    with create_pipe_input() as keys, create_app_session(input=keys):
        yield keys


def talk(keyboard: PipeInput, keys: str, *flags: str) -> int:
    keyboard.send_text(keys)
    return main.main(["generate", "--workdir=x", *flags])


def test_the_prompt_line_stays_open(
    model: Scripted, keyboard: PipeInput, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    model.before = scripted.kill(signal.SIGINT, "cancel [MASK]")
    said = "a [MASK]\r \r\rcancel [MASK]\rdropped\x03a [MASK]\r"
    assert talk(keyboard, f"{said}\x04") == 0
    output, errors = capsys.readouterr()
    assert output == "a <a0>\na <a1>\n" and "> " in errors  # an equal prompt draws anew
    assert talk(keyboard, "b\r\x04", "--json") == 0
    assert capsys.readouterr().out == '{"text": "b", "fills": []}\n'
    history = (tmp_path / "state/glm_jax/prompts").read_text().splitlines()
    assert [line for line in history if line.startswith("+")] == [
        "+a [MASK]",
        "+ ",
        "+cancel [MASK]",
        "+a [MASK]",
        "+b",
    ]
    assert (tmp_path / "state/glm_jax").stat().st_mode & 0o777 == 0o700


def test_a_bad_prompt_is_one_line_and_the_next_is_answered(
    model: Scripted, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    def before(prompt: str) -> None:
        if prompt == "bad":
            raise generate.UserError("the prompt is too long")

    model.before = before
    assert talk(keyboard, "bad\ra [MASK]\r\x04") == 0
    output, errors = capsys.readouterr()
    assert output == "a <a0>\n" and "error: the prompt is too long\n" in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_other_signals_end_it(
    number: int, model: Scripted, keyboard: PipeInput, capsys: pytest.CaptureFixture[str]
) -> None:
    model.before = scripted.kill(number, "a")
    before = signal.getsignal(signal.SIGINT)
    assert talk(keyboard, "a\rb\r\x04") == signals.INTERRUPTED
    assert capsys.readouterr().err.endswith(f"{signals.LINE}\n") and len(model.asked) == 1
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize("place", ["file", "no home"])
def test_a_history_that_cannot_be_kept_costs_nothing(
    place: str, model: Scripted, keyboard: PipeInput, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "file") if place == "file" else "~nobody-of-this-name/x")
    assert talk(keyboard, "a\r\x04") == 0 and len(model.asked) == 1


def test_without_prompt_toolkit_input_asks(
    model: Scripted, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    calls: list[tuple[str, object]] = []
    lines = iter(["a [MASK]", UnicodeDecodeError("utf-8", b"\xff", 0, 1, ""), "b", EOFError()])

    def ask(prompt: str) -> str:
        assert prompt == ""  # it would go to standard output, which is no terminal
        if isinstance(line := next(lines), Exception):
            raise line
        return line

    def read_history_file(path: Path) -> None:
        calls.append(("read", path.name))
        raise FileNotFoundError

    readline = SimpleNamespace(
        read_history_file=read_history_file,
        set_history_length=lambda length: calls.append(("keep", length)),
        write_history_file=lambda path: calls.append(("write", path.name)),
    )
    monkeypatch.setitem(sys.modules, "prompt_toolkit", None)
    monkeypatch.setitem(sys.modules, "readline", readline)
    monkeypatch.setattr(builtins, "input", ask)
    assert main.main(["generate", "--workdir=x"]) == 0
    output, errors = capsys.readouterr()
    assert output == "a <a0>\nb\n"
    assert errors.splitlines()[0] == "blanks in colours and a better prompt line: pip install -e '.[prompt]'"
    assert "error: the prompt is not valid UTF-8: check the encoding of the terminal\n" in errors
    assert calls == [("read", "prompts.readline"), ("keep", 1000), *[("write", "prompts.readline")] * 2]
    monkeypatch.setitem(sys.modules, "readline", None)  # as Python may be built
    lines = iter(["a", EOFError()])
    assert main.main(["generate", "--workdir=x"]) == 0 and len(calls) == 4


@pytest.mark.parametrize("alone, terminal", [(True, True), (False, True), (True, False)])
def test_tokens_are_shown_one_by_one_on_the_terminal_of_a_single_process(
    alone: bool, terminal: bool, model: Scripted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All processes must look equally often, and only one of them may have a terminal."""
    monkeypatch.setattr("glm_jax.parallel.processes.alone", lambda: alone)
    monkeypatch.setattr(sys.stdout, "isatty", lambda: terminal)
    assert main.main(["generate", "--workdir=x", "--prompt=a"]) == 0
    assert model.watched == [alone and terminal]


def test_a_cancelled_fill_waits_for_the_end_of_an_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A KeyboardInterrupt within an import could become another error, or abort the process."""
    (tmp_path / "imports_slowly.py").write_text("import os\nos.kill(os.getpid(), 2)\nwhole = True\n")
    monkeypatch.syspath_prepend(tmp_path)
    with signals.cancelling():
        imported = importlib.import_module("imports_slowly")
        with pytest.raises(KeyboardInterrupt):
            time.sleep(HANG)
    assert imported.whole


TERMINAL = """
import fcntl, sys, termios, time
import pytest
from glm_jax.cli import main
from tests.cli import scripted


def before(text):
    if "slow" in text:
        print("it begins")
        time.sleep(3600)


fcntl.ioctl(0, termios.TIOCSCTTY, 0)  # Ctrl-C reaches this process
with pytest.MonkeyPatch.context() as patch:
    scripted.install(patch, before)
    sys.exit(main.main(["generate", "--workdir=x"]))
"""


class Terminal:
    """A process that has a terminal of its own."""

    def __init__(self, script: str, environment: dict[str, str]) -> None:
        self._terminal, end = pty.openpty()
        command = [sys.executable, "-c", script]
        self._process = subprocess.Popen(
            command, stdin=end, stdout=end, stderr=end, env=environment, start_new_session=True
        )
        os.close(end)
        self._seen = b""

    def until(self, word: str, press: str = "") -> None:
        """Read to a word; a key may be pressed until it comes."""
        patience = time.monotonic() + HANG
        while word.encode() not in self._seen:
            assert time.monotonic() < patience, self._seen
            if select.select([self._terminal], [], [], 0.3)[0]:
                self._seen += os.read(self._terminal, 4096)
            elif press:
                self.type(press)
        self._seen = self._seen.partition(word.encode())[2]

    def type(self, keys: str) -> None:
        os.write(self._terminal, keys.encode())

    def ends(self) -> int:
        """Return the exit code."""
        code = self._process.wait()
        os.close(self._terminal)
        return code


OPENED = "\x1b[?2004h"  # the prompt line takes pasted text from now on
UP = "\x1b[A"


@pytest.mark.slow
def test_on_a_terminal_blanks_have_a_colour_and_fills_are_underlined(tmp_path: Path) -> None:
    (tmp_path / "glm_jax").mkdir()
    FileHistory(tmp_path / "glm_jax/prompts").store_string("中 [MASK].")  # of another session
    variables = {"PYTHONPATH": str(Path(__file__).parents[2]), "XDG_STATE_HOME": str(tmp_path)}
    variables |= {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}
    terminal = Terminal(TERMINAL, {**os.environ, **variables})
    terminal.until(OPENED)
    terminal.until("36;1m[MASK]", press=UP)
    terminal.type("\r")
    terminal.until("中 \x1b[4m<\x1b[0m\x1b[4m中\x1b[0m\x1b[4m0\x1b[0m\x1b[4m>\x1b[0m.\r\n")
    terminal.until(OPENED)
    terminal.type("slow\r")
    terminal.until("it begins")
    terminal.type("\x03")
    terminal.until(OPENED)
    terminal.type("\x04")
    assert terminal.ends() == 0
