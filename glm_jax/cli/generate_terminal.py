"""Prompts of a person at a terminal: texts that grow while they are filled, and a prompt line that stays open."""

from __future__ import annotations

import contextlib
import os
import re
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

from glm_jax import signals
from glm_jax.cli.common import say
from glm_jax.errors import UserError, printable
from glm_jax.inference import Model
from glm_jax.inference.pending import Filled, Settings
from glm_jax.inference.prompts import BLANK, Piece
from glm_jax.parallel import processes

UNDERLINED, PLAIN = "\x1b[4m", "\x1b[0m"
INCOMPLETE = "\ufffd"  # what the first bytes of a character decode to
LINES = 1000  # of the history, without prompt_toolkit

Write = Callable[[str], object]


class Stream:
    """Prints a text while its blanks are filled, from its beginning to what is certain."""

    def __init__(self, stop: Sequence[str], write: Write, *, styled: bool) -> None:
        """Begin a text.

        Args:
            stop: strings that end a fill and are left out of it.
            write: called with what is new.
            styled: whether fills are underlined.
        """
        self._stop, self._write, self._styled = stop, write, styled
        self._pieces: Sequence[Piece] = ()
        self._place: int | None = None  # of the piece that is growing
        self._printed = ""

    def watch(self, number: int, pieces: Sequence[Piece]) -> None:
        """Print what is certain of a text whose next blank is being filled."""
        del number
        self._place = self._growing(pieces)
        self._pieces = list(pieces)
        certain = list[Piece]()
        for place, piece in enumerate(pieces):
            if piece.blank:
                break
            if place == self._place:
                certain.append(piece._replace(text=self._settled(piece.text)))
                break
            certain.append(piece)
        self._print(certain)

    def _growing(self, pieces: Sequence[Piece]) -> int | None:
        """Return the place of the piece that has grown since the last call."""
        if not self._pieces:
            return next((place for place, piece in enumerate(pieces) if piece.fill is not None), None)
        changed = (place for place, (old, new) in enumerate(zip(self._pieces, pieces, strict=False)) if old != new)
        return next(changed, self._place)

    def _settled(self, text: str) -> str:
        """Return a fill without half a character or the beginning of a stop string at its end."""
        text = text.rstrip(INCOMPLETE)
        starts = [stop[:size] for stop in self._stop for size in range(1, len(stop))]
        return text[: len(text) - max((len(start) for start in starts if text.endswith(start)), default=0)]

    def _print(self, pieces: Sequence[Piece]) -> None:
        """Print what follows what was printed. A text that has changed before its end waits for `finish`."""
        text = "".join(piece.text for piece in pieces)
        if not text.startswith(self._printed):
            return
        start = 0
        for piece in pieces:
            if new := piece.text[max(0, len(self._printed) - start) :]:
                self._write(self._shown(new, is_fill=piece.fill is not None))
            start += len(piece.text)
        self._printed = text

    def _shown(self, text: str, *, is_fill: bool) -> str:
        if not is_fill:
            return text  # the user's own
        text = printable(text, keep="\n\t")
        return f"{UNDERLINED}{text}{PLAIN}" if self._styled else text

    def finish(self, filled: Filled) -> None:
        """Print the rest of a text, or all of it again if it has changed."""
        if not filled.text.startswith(self._printed):
            self._write("\n")
            self._printed = ""
        self._print(filled.pieces)
        self._write("\n")


def show(model: Model, settings: Settings, text: str, repeat: int = 0) -> None:
    """Fill a text and print it; token by token if standard output is a terminal. All processes must call.

    Args:
        model: a model.
        settings: for the text.
        text: a prompt.
        repeat: how many equal prompts came before.

    Raises:
        UserError: it cannot be filled.
    """
    first, terminal = processes.is_first(), sys.stdout.isatty()
    stream = Stream(settings.stop, _write if first else len, styled=terminal)
    # looking at every token is a collective, and only some of the processes may have a terminal
    watch = stream.watch if terminal and processes.alone() else None
    for _, filled in model.fill_each([text], settings, say if first else None, watch, repeats=[repeat]):
        stream.finish(filled)


def _write(text: str) -> None:
    print(text, end="", flush=True)


def converse(answer: Callable[[str, int], None]) -> int:
    """Read prompts until the end of input (Ctrl-D) and answer each; return the exit code.

    Ctrl-C cancels an answer. A prompt that cannot be answered is one line.

    Args:
        answer: called with a prompt, and how many equal ones were answered before.
    """
    ask, answered = _reader(), Counter[str]()
    with signals.cancelling():
        while True:
            try:
                text = ask()
                if text.strip():
                    answer(text, answered[text])
                    answered[text] += 1
            except EOFError:
                say("")
                return 0
            except UserError as error:
                say(f"error: {error}")
            except UnicodeDecodeError:
                say("error: the prompt is not valid UTF-8: check the encoding of the terminal")
            except KeyboardInterrupt:
                say("")


def _reader() -> Callable[[], str]:
    """Return a function that asks for a prompt, with a history that lasts."""
    folder = _history_folder()
    try:
        return _session(folder)
    except ModuleNotFoundError:
        say("blanks in colours and a better prompt line: pip install -e '.[prompt]'")
        return _plain(folder)


def _history_folder() -> Path | None:
    """Make and return glm_jax in the user's state folder (XDG_STATE_HOME, else ~/.local/state), or None."""
    named = os.environ.get("XDG_STATE_HOME") or "~/.local/state"
    try:
        folder = Path(named).expanduser() / "glm_jax"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
    except (OSError, RuntimeError):  # RuntimeError: there is no home
        return None
    return folder if os.access(folder, os.W_OK) else None


def _session(folder: Path | None) -> Callable[[], str]:
    from prompt_toolkit import PromptSession
    from prompt_toolkit.document import Document
    from prompt_toolkit.formatted_text import StyleAndTextTuples
    from prompt_toolkit.history import FileHistory, InMemoryHistory
    from prompt_toolkit.lexers import Lexer
    from prompt_toolkit.output import create_output

    class Blanks(Lexer):
        """Colours blanks."""

        def lex_document(self, document: Document) -> Callable[[int], StyleAndTextTuples]:
            def line(number: int) -> StyleAndTextTuples:
                parts = re.split(f"({BLANK.pattern})", document.lines[number])
                return [("ansicyan bold" if place % 2 else "", part) for place, part in enumerate(parts)]

            return line

    history = FileHistory(folder / "prompts") if folder else InMemoryHistory()
    # the line is drawn on standard error if standard output leads elsewhere
    output = None if sys.stdout.isatty() else create_output(sys.stderr)
    session = PromptSession[str]("> ", lexer=Blanks(), history=history, output=output)
    return session.prompt


def _plain(folder: Path | None) -> Callable[[], str]:
    """Return a function that asks by `input`, with readline where Python has it."""
    try:
        import readline
    except ImportError:
        readline = None
    file = folder and folder / "prompts.readline"
    if readline and file:
        with contextlib.suppress(OSError):  # there is no history yet
            readline.read_history_file(file)
        readline.set_history_length(LINES)

    def ask() -> str:
        if not sys.stdout.isatty():
            print("> ", end="", file=sys.stderr, flush=True)
        text = input("> " if sys.stdout.isatty() else "")
        if readline and file:
            with contextlib.suppress(OSError):  # a history is a convenience
                readline.write_history_file(file)
        return text

    return ask
