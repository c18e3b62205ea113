"""What a disk may do to a file."""

import os
from pathlib import Path


def flip(path: Path) -> None:
    """Flip a bit in the middle of a file, if it has one."""
    content = bytearray(path.read_bytes())
    if content:
        content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def empty(path: Path) -> None:
    """Leave a file without content."""
    os.truncate(path, 0)
