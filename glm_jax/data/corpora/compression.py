"""Decompress files of text in little memory, whatever they say of themselves."""

from __future__ import annotations

import bz2
import gzip
import io
import lzma
import zlib
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol

from glm_jax.data.corpora.records import import_package

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

PIECE = 1 << 10  # compressed bytes at a time: no more than 256 blocks of zstd, each of at most 128 KiB
WINDOW = 1 << 27  # bytes of past text that a file may make us hold, as with zstd --long and xz -9
FREE = 1 << 30  # bytes that a file may hold whatever its size; beyond, it holds at most
EXPANSION = 1000  # bytes of text a compressed byte: no text repeats itself more


class Broken(Exception):
    """Compressed content ends here, though the file says that there is more; the attributes are those of Damaged."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason, self.message = reason, message


class _Frame(Protocol):
    """What decompressors of one frame have in common."""

    @property
    def eof(self) -> bool: ...
    @property
    def unused_data(self) -> bytes: ...
    def decompress(self, data: bytes, /) -> bytes: ...


class _Frames:
    """The content of frames, one after another. Raises EOFError if the file ends in the middle of one."""

    def __init__(self, stream: io.BufferedIOBase, start: Callable[[], _Frame]) -> None:
        self._stream, self._start = stream, start
        self._frame: _Frame | None = None
        self._between = False  # whether a frame has ended
        self._unused = b""
        self._ready = memoryview(b"")

    def read1(self, size: int) -> memoryview:
        while not self._ready:
            data = self._unused or self._stream.read(PIECE)
            self._unused = b""
            if not data:
                if self._frame is not None:
                    raise EOFError
                break
            if self._frame is None:
                data = data.lstrip(b"\0") if self._between else data  # xz pads frames with zeros; none begins with one
                if not data:
                    continue
                self._frame = self._start()
            self._ready = memoryview(self._frame.decompress(data))
            if self._frame.eof:
                self._unused, self._frame, self._between = self._frame.unused_data, None, True
        taken, self._ready = self._ready[:size], self._ready[size:]
        return taken


class Decompressed(io.RawIOBase):
    """The decompressed content of a stream. Reading raises Broken where it is damaged, cut off or too much."""

    def __init__(self, stream: io.BufferedReader, name: str) -> None:
        """Args: name: the compression, a key of kinds.COMPRESSED."""
        self._stream, self._name, self._size = stream, name, 0
        self._errors: tuple[type[Exception], ...] = (zlib.error, lzma.LZMAError, OSError)
        if name == "zstd":
            zstandard = import_package("zstd", "zstandard")
            self._errors = (zstandard.ZstdError,)
            self._content = _Frames(stream, zstandard.ZstdDecompressor(max_window_size=WINDOW).decompressobj)
        elif name == "xz":
            self._content = _Frames(stream, lambda: lzma.LZMADecompressor(lzma.FORMAT_XZ, WINDOW))
        else:
            self._content = gzip.GzipFile(fileobj=stream) if name == "gzip" else bz2.BZ2File(stream)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        room = memoryview(buffer)
        if self._size > FREE + EXPANSION * self._stream.tell():
            raise Broken("too long", f"{self._name} expands over {EXPANSION}-fold here: no text does, leave it out")
        try:
            data = self._content.read1(len(room))
        except EOFError:
            raise Broken("truncated", f"the {self._name} file ends too early: fetch it again") from None
        except self._errors as error:
            if isinstance(error, OSError) and error.errno is not None:  # the disk's, not the decompressor's
                raise
            if "memory" in str(error).lower():
                limit = f"needs over {WINDOW >> 20} MiB of memory"
                raise Broken("unreadable", f"{self._name} {limit}: compress it with a smaller window") from None
            raise Broken("unreadable", f"not a whole {self._name} file ({error}): fetch it again") from None
        room[: len(data)] = data
        self._size += len(data)
        return len(data)
