"""Pieces appended to a SentencePiece model, in the format of sentencepiece_model.proto."""

from __future__ import annotations

from collections.abc import Iterable

# Types of pieces
NORMAL, CONTROL, USER_DEFINED, BYTE = 1, 3, 4, 6
# Fields of ModelProto, and of its TrainerSpec
_PIECES, _TRAINER_SPEC, _BYTE_FALLBACK = 1, 2, 35


def append(model: bytes, pieces: Iterable[tuple[str, int]], *, byte_fallback: bool = False) -> bytes:
    """Return a model with more pieces, given by name and type, whose ids follow those of its own.

    Args:
        model: a serialised SentencePiece model.
        pieces: in the order of their ids. Control pieces never match text.
        byte_fallback: spell text that has no piece in byte pieces.
    """
    # Fields appended to a protocol buffer extend its lists and override its values.
    model += b"".join(_message(_PIECES, _piece(name, kind)) for name, kind in pieces)
    if byte_fallback:
        model += _message(_TRAINER_SPEC, _varint(_BYTE_FALLBACK << 3) + b"\x01")
    return model


def _piece(name: str, kind: int) -> bytes:
    return _message(1, name.encode()) + b"\x15" + bytes(4) + b"\x18" + bytes([kind])  # name, score 0, type


def _message(field: int, content: bytes) -> bytes:
    return _varint(field << 3 | 2) + _varint(len(content)) + content


def _varint(value: int) -> bytes:
    """Encode an integer as protocol buffers do: seven bits per byte, lowest first."""
    encoded = bytearray()
    while value > 127:
        encoded.append(value & 127 | 128)
        value >>= 7
    return bytes([*encoded, value])
