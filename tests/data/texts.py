"""English and code-like documents that are the same on every Python."""

from pathlib import Path

ENGLISH = tuple(Path(__file__).with_name("english.txt").read_text("utf-8").rstrip("\n").split("\n%\n"))
