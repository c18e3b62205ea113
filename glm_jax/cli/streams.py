"""Standard output and standard error, wherever they lead: any encoding, closed, or a disk that is full."""

from __future__ import annotations

import io
import os
import sys
from typing import TextIO


def prepare() -> None:
    """Let every text be printed: what a terminal's encoding lacks is escaped, and a closed stream is replaced."""
    if sys.stdout is None:  # pyright: ignore[reportUnnecessaryComparison] (Python's None for a closed descriptor)
        sys.stdout = os.fdopen(os.open(os.devnull, os.O_RDONLY), "w", encoding="utf-8")  # refuses what is printed
    if sys.stderr is None:  # pyright: ignore[reportUnnecessaryComparison]
        sys.stderr = os.fdopen(os.open(os.devnull, os.O_WRONLY), "w", encoding="utf-8")
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def refuses_output() -> bool:
    """Whether standard output cannot be written to. What it still holds is then dropped."""
    try:
        print(flush=True)
    except OSError:
        drop(sys.stdout)
        return True
    return False


def drop(stream: TextIO) -> None:
    """Let a stream lead nowhere, or what it still holds would fail again when Python exits."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
