"""GLM-130B's own tokenizer: the official ice_text.model, its ids, and how it treats newlines and spaces.

Ids (icetk and SwissArmyTransformer, as the released model uses them):

    0 to 19,999    image tokens, which text never produces; 0 is pad
    20,000 on      the pieces of ice_text.model, 130,000 of them: unk 20,000, eos 20,002, newline 20,004
    150,000 on     [MASK] [gMASK] [sMASK] eod sop eop ENC dBLOCK, a tab, runs of 2 to 80 spaces, 256 bytes

The model's own normalisation changes text: full-width punctuation becomes half-width, and each text loses a leading
space. So decoding does not restore every text.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import sentencepiece

from glm_jax.data.tokenizers.sentencepiece import MASKS, Tokenizer, lacking, read_bytes
from glm_jax.errors import UserError

IMAGE_TOKENS = 20_000
PIECES = 130_000  # of ice_text.model
NEWLINE, TAB = "<n>", "<|tab|>"
FIRST_PIECES = {"unk": 0, "</s>": 2, NEWLINE: 4}
LONGEST_RUN = 80  # the longest run of spaces that has a token
BLANKS = [f"<|blank_{length}|>" for length in range(2, LONGEST_RUN + 1)]
CONTROLS = (*MASKS, "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")

# Types of pieces, and fields of sentencepiece_model.proto
_CONTROL, _USER_DEFINED, _BYTE = 3, 4, 6
_PIECES_FIELD, _TRAINER_SPEC, _BYTE_FALLBACK = 1, 2, 35


def read_model(path: str | Path, *, pinned: bool) -> bytes:
    """Read a tokenizer's model: one of ours unchanged, or ice_text.model with the special pieces that GLM-130B added.

    Args:
        path: the file.
        pinned: read ice_text.model as the inference code of 2022 did: newlines, tabs and runs of spaces are lost, and
            text without a piece is unk. Otherwise read it as from March 2023 on, which loses none of these.

    Raises:
        UserError: the file is missing, is neither of the two, or already has the special pieces of the other reading.
    """
    model, processor = read_bytes(path)
    if not _lacking_pieces(processor, PIECES):
        return extend(model, pinned=pinned)
    if not lacking(processor):
        if pinned:
            raise UserError(f"data.tokenizer.pinned is for ice_text.model, {path} is not: set it to False")
    elif not lacking_extension(processor):
        if pinned != is_pinned(processor):
            raise UserError(f"{path} was read with pinned={not pinned}: set data.tokenizer.pinned={not pinned}")
    else:
        raise foreign(path, processor)
    return model


def foreign(path: str | Path, processor: sentencepiece.SentencePieceProcessor) -> UserError:
    """Return the error that says what keeps a model from being a tokenizer of ours, or ice_text.model."""
    extended = processor.piece_to_id(CONTROLS[-1]) != processor.unk_id()
    not_ice = lacking_extension(processor) if extended else _lacking_pieces(processor, PIECES)
    return UserError(f"{path} is no tokenizer of ours ({lacking(processor)}), nor ice_text.model ({not_ice})")


def is_pinned(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a model with GLM-130B's special pieces is read as the inference code of 2022 did."""
    return processor.is_control(processor.piece_to_id(TAB))


def lacking_extension(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say what keeps a model from being ice_text.model with GLM-130B's special pieces; empty if it is that."""
    pinned = is_pinned(processor)
    added = _added(pinned)
    if reason := _lacking_pieces(processor, PIECES + len(added)):
        return reason
    for number, (name, kind) in enumerate(added, PIECES):
        right = processor.is_control(number) == (kind == _CONTROL) and processor.is_byte(number) == (kind == _BYTE)
        if processor.id_to_piece(number) != name or not right:
            return f"its piece {number:,} is not {name}"
    return ""


def _lacking_pieces(processor: sentencepiece.SentencePieceProcessor, size: int) -> str:
    """Say what keeps a model's pieces from being `size` that begin as those of ice_text.model do."""
    if processor.get_piece_size() != size:
        return f"it has {processor.get_piece_size():,} pieces, not {size:,}"
    found = {"unk": processor.unk_id(), "</s>": processor.piece_to_id("</s>"), NEWLINE: processor.piece_to_id(NEWLINE)}
    wrong = next((name for name, number in FIRST_PIECES.items() if found[name] != number), "")
    return f"its piece {FIRST_PIECES[wrong]} is not {wrong}" if wrong else ""


def _added(pinned: bool) -> list[tuple[str, int]]:
    """Return the names and types of the special pieces, in the order of their ids."""
    blanks = _CONTROL if pinned else _USER_DEFINED  # control pieces never match text
    pieces = [(name, _CONTROL) for name in CONTROLS] + [(name, blanks) for name in (TAB, *BLANKS)]
    return pieces if pinned else pieces + [(f"<0x{byte:02X}>", _BYTE) for byte in range(256)]


def extend(model: bytes, *, pinned: bool) -> bytes:
    """Append GLM-130B's special pieces to ice_text.model; see `read_model`."""
    # Fields appended to a protocol buffer extend its lists and override its values.
    model += b"".join(_message(_PIECES_FIELD, _piece(name, kind)) for name, kind in _added(pinned))
    if not pinned:
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


class IceTokenizer(Tokenizer):
    """GLM-130B's tokenizer, made from the result of `read_model`; see the module's docstring and Tokenizer.

    The model itself shows whether it is the pinned one. The other attributes are Tokenizer's.

    Attributes:
        eod, enc, dblock: ids of the special tokens that only this tokenizer has.
    """

    def __init__(self, model: bytes):
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = IMAGE_TOKENS + self._processor.get_piece_size()
        self.pad, self.unk, self.eos = 0, self._id("<unk>"), self._id("</s>")
        self.mask, self.gmask, self.smask, self.eod, self.sop, self.eop, self.enc, self.dblock = map(self._id, CONTROLS)
        self._names = {self._id(piece): piece.strip("<>") for piece in CONTROLS} | {self.eos: "eos"}
        self._keeps_blanks = not is_pinned(self._processor)
        lengths = [0] * IMAGE_TOKENS + [len(self._bytes_of(token)) for token in range(self._processor.get_piece_size())]
        self.token_bytes = np.array(lengths, np.int32)

    def __reduce__(self) -> tuple[type[Tokenizer], tuple[bytes]]:
        return IceTokenizer, (self.model,)

    def _id(self, piece: str) -> int:
        return IMAGE_TOKENS + self._processor.piece_to_id(piece)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        restored = _restore(piece)
        return restored.encode() if restored != piece else super()._bytes_of(token)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. A space is added before it; a [MASK] written in it stays text."""
        if self._keeps_blanks:
            text = text.replace("\n", NEWLINE).replace("\t", TAB)
            text = re.sub(f" {{2,{LONGEST_RUN}}}", lambda run: BLANKS[len(run[0]) - 2], text)
        return np.array(self._processor.encode(text), np.int32) + np.int32(IMAGE_TOKENS)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Return the text of `ids`. Image tokens give nothing; special tokens give their names if `specials`.

        Text between special tokens is decoded separately, without its first space.
        """
        parts: list[str] = []
        run: list[int] = []
        for token in [*map(int, ids), self.eos]:
            if token not in self._names:
                run += [token - IMAGE_TOKENS] * (token >= IMAGE_TOKENS)
                continue
            parts += [_restore(self._processor.decode(run)), self._names[token] if specials else ""]
            run = []
        return "".join(parts[:-1])


def _restore(text: str) -> str:
    """Replace the pieces of newlines, tabs and runs of spaces by what they stand for."""
    text = text.replace(NEWLINE, "\n").replace(TAB, "\t")
    return re.sub(r"<\|blank_(\d+)\|>", lambda run: " " * int(run[1]), text)
