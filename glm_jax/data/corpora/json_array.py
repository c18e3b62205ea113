"""Read the elements of a JSON array one at a time, from a file of any size; a broken one does not cost the others."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator
from io import BufferedIOBase

CHUNK = 1 << 20  # bytes read at a time
DEEPEST = 1000  # brackets inside each other that are told apart; no more can be read, so deeper ones are counted

_BRACKET = re.compile(rb'["\[\]{}:,]')
_INSIDE_STRING = re.compile(rb'(?:[^"\\\n]++|\\[^\n])*+')
_OPENS = {ord("}"): ord("{"), ord("]"): ord("[")}


class Elements:
    """Iterate over (line, bytes) of the elements of one array; bytes is None for an element over `limit` bytes.

    This only follows brackets and strings; the caller must check whether an element is JSON. Two rules of JSON show
    where a broken element ends: a string holds no newline, and inside an object a bracket opens only after a colon.
    What follows is then taken as a new element.

    Attributes:
        begun, closed: after the iteration, whether the array's start and its end were found.
        line: the line reached, counted from 1; of the last element, if it is not finished.
    """

    def __init__(self, stream: BufferedIOBase, limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._held = bytearray()  # the element so far, from earlier chunks
        self._too_long = False
        self._stack = bytearray(b"[")  # open brackets
        self._deeper = 0  # how many are open beyond the stack
        self.begun = self.closed = False
        self.line = 1

    def __iter__(self) -> Iterator[tuple[int, bytes | None]]:
        first = self._begin()
        if not self.begun:
            return
        inside, skip, last = False, 0, 0  # in a string; bytes of the next chunk that are escaped; last token
        for chunk in itertools.chain([first], iter(lambda: self._stream.read1(CHUNK), b"")):
            place, start = min(skip, len(chunk)), 0
            skip -= place
            while place < len(chunk) and not self.closed:
                if inside:
                    found = _INSIDE_STRING.match(chunk, place)
                    place = found.end() if found else place
                    if place == len(chunk):
                        break
                    if chunk[place] == ord("\\") and place + 1 == len(chunk):
                        skip, place = 1, place + 1
                        break
                    inside = False
                    place += 1
                    if chunk[place - 1] != ord('"'):  # a newline: the string was never closed
                        yield from self._cut(chunk[start:place])
                        start, self._stack, self._deeper = place, bytearray(b"["), 0
                    continue
                match = _BRACKET.search(chunk, place)
                if match is None:
                    break
                token, place = chunk[match.start()], match.end()
                if token == ord('"'):
                    inside = True
                elif token == ord(",") and len(self._stack) == 1:
                    yield from self._cut(chunk[start : place - 1])
                    start = place
                elif len(self._stack) == DEEPEST and (token in b"[{" or (self._deeper and token in b"]}")):
                    self._deeper += 1 if token in b"[{" else -1
                elif token in b"[{":
                    if self._stack[-1] == ord("{") and last != ord(":"):
                        yield from self._cut(chunk[start : place - 1])
                        start, self._stack = place - 1, bytearray(b"[")
                    self._stack.append(token)
                elif token in b"]}":
                    if len(self._stack) == 1 and token == ord("]"):
                        yield from self._cut(chunk[start : place - 1])
                        start, self.closed = place, True
                    elif (opened := self._stack.rfind(_OPENS[token], 1)) > 0:
                        del self._stack[opened:]  # with brackets left open inside
                last = token
            self._hold(chunk[start:])
            if self.closed:
                return
        yield from self._cut(b"")

    def _begin(self) -> bytes:
        """Read up to the array's first bracket and return the rest of its chunk."""
        while chunk := self._stream.read1(CHUNK):
            rest = chunk.lstrip(b"\xef\xbb\xbf \t\r\n")
            self._count(chunk[: len(chunk) - len(rest)])
            if rest:
                self.begun = rest.startswith(b"[")
                return rest[1:]
        return b""

    def _hold(self, part: bytes) -> None:
        if self._too_long or len(self._held) + len(part) > self._limit:
            self._too_long = True
            self._count(bytes(self._held) + part)
            self._held.clear()
        else:
            self._held += part

    def _count(self, part: bytes) -> None:
        self.line += part.count(b"\n")

    def _cut(self, end: bytes) -> Iterator[tuple[int, bytes | None]]:
        """Yield the element that `end` completes, unless it is empty."""
        self._hold(end)
        element = bytes(self._held)
        self._held.clear()
        if self._too_long:
            self._too_long = False
            yield self.line, None
            return
        stripped = element.lstrip()
        self._count(element[: len(element) - len(stripped)])
        if stripped:
            yield self.line, stripped.rstrip()
            self._count(stripped)
