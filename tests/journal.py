"""A record of what was synced to the disk, for tests of what a crash would leave."""

import os
import stat
from collections.abc import Callable
from pathlib import Path

import pytest


class Journal:
    """Follows os.fsync, os.replace and os.rename, and tells what a crash would leave.

    Attributes:
        synced: inode of a file or folder -> its size or its names when it was last synced.
        renamed: (source, target, whether everything below the source was synced) of each rename.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.synced: dict[int, int | list[str]] = {}
        self.renamed: list[tuple[Path, Path, bool]] = []
        self._fsync = os.fsync
        monkeypatch.setattr(os, "fsync", self._sync)
        for name in ("replace", "rename"):
            monkeypatch.setattr(os, name, self._follow(getattr(os, name)))

    def _sync(self, descriptor: int) -> None:
        self._fsync(descriptor)
        status = os.fstat(descriptor)
        folder = stat.S_ISDIR(status.st_mode)
        self.synced[status.st_ino] = sorted(os.listdir(descriptor)) if folder else status.st_size

    def is_safe(self, path: Path) -> bool:
        """Whether a file, or the names in a folder, would survive a crash as they are now."""
        now = sorted(os.listdir(path)) if path.is_dir() else path.stat().st_size
        return self.synced.get(path.stat().st_ino) == now

    def _follow(self, rename: Callable[[str | Path, str | Path], None]) -> Callable[[str | Path, str | Path], None]:
        def follow(source: str | Path, target: str | Path) -> None:
            safe = all(map(self.is_safe, [Path(source), *Path(source).rglob("*")]))
            rename(source, target)
            self.renamed.append((Path(source), Path(target), safe))

        return follow
