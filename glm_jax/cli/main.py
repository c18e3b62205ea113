"""The command line: `glm-jax <command> [flags]`.

Commands import the rooms that they need when they run, so that `--help` and `glm-jax config` answer at once.
Exit codes: 0 done, 1 another process of the run is gone (one line), 2 a usage or configuration error (one line),
3 stopped early on request with what was done saved, 4 the work itself failed and said why (one line), 130 interrupted
before there was anything to save, 141 the reader of its output is gone, as after `| head`.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import sys
from collections.abc import Callable, Sequence

from absl import logging

from glm_jax import signals
from glm_jax.cli import streams
from glm_jax.cli.common import say
from glm_jax.config.fields import closest
from glm_jax.errors import UserError, WorkFailed

Command = Callable[[Sequence[str]], int]

COMMANDS = (
    "train",
    "generate",
    "evaluate",
    "compare",
    "convert",
    "corpus",
    "config",
    "plan",
    "schedule",
    "report",
    "sweep",
)  # modules in this folder
UNREAD = 141  # a shell's exit code for a program that SIGPIPE has ended


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command, and return the exit code."""
    streams.prepare()
    try:
        with signals.handled(signals.Interrupt()):
            code = _run(arguments)
            print(end="", flush=True)  # an unread pipe cannot be handled any more at the interpreter's exit
        return code
    except KeyboardInterrupt:
        say(signals.LINE)
        return signals.INTERRUPTED
    except BrokenPipeError:  # `| head` has read enough
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # or its buffer would be flushed again, and fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD
    except OSError as error:
        if not streams.refuses_output():
            raise
        say(f"error: standard output cannot be written to ({error.strerror}): send it elsewhere")
        return 2


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.set_verbosity(logging.ERROR)  # orbax explains itself at length
    if arguments[:1] == ["help"]:
        arguments = [*arguments[1:], "--help"]
    if arguments == ["--version"]:
        print(f"glm-jax {_version()}")
        return 0
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: glm-jax <command> [flags]\n")
        for name in COMMANDS:
            print(f"  {name:10} {(_command(name).__doc__ or '').splitlines()[0]}")
        print("\n`glm-jax <command> --help` lists a command's flags.")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]}: {closest(arguments[0], list(COMMANDS))}")
        return _command(arguments[0])(arguments[1:])
    except UserError as error:
        say(f"error: {error}")
        return 2
    except WorkFailed as error:
        say(f"failed: {error}")
        return 4


def _version() -> str:
    try:
        return importlib.metadata.version("glm-jax")
    except importlib.metadata.PackageNotFoundError:
        return "(not installed: run from its folder)"


def _command(name: str) -> Command:
    return importlib.import_module(f"glm_jax.cli.{name}").run
