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

import numpy as np
import sentencepiece

from glm_jax.data.tokenizers import pieces
from glm_jax.data.tokenizers.sentencepiece import MASKS, SentencePieceTokenizer

IMAGE_TOKENS = 20_000
PIECES = 130_000  # of ice_text.model
NEWLINE, TAB = "<n>", "<|tab|>"
FIRST_PIECES = {"unk": 0, "</s>": 2, NEWLINE: 4}
LONGEST_RUN = 80  # the longest run of spaces that has a token
BLANKS = [f"<|blank_{length}|>" for length in range(2, LONGEST_RUN + 1)]
CONTROLS = (*MASKS, "<eod>", "<sop>", "<eop>", "<ENC>", "<dBLOCK>")


def is_pinned(processor: sentencepiece.SentencePieceProcessor) -> bool:
    """Whether a model with GLM-130B's special pieces is read as the inference code of 2022 did."""
    return processor.is_control(processor.piece_to_id(TAB))


def lacking(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say what keeps a model from being ice_text.model as it was published; empty if it is that."""
    return _lacking_pieces(processor, PIECES)


def lacking_extension(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say what keeps a model from being ice_text.model with GLM-130B's special pieces; empty if it is that."""
    pinned = is_pinned(processor)
    added = _added(pinned)
    if reason := _lacking_pieces(processor, PIECES + len(added)):
        return reason
    for number, (name, kind) in enumerate(added, PIECES):
        found = (processor.id_to_piece(number), processor.is_control(number), processor.is_byte(number))
        if found != (name, kind == pieces.CONTROL, kind == pieces.BYTE):
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
    blanks = pieces.CONTROL if pinned else pieces.USER_DEFINED  # control pieces never match text
    added = [(name, pieces.CONTROL) for name in CONTROLS] + [(name, blanks) for name in (TAB, *BLANKS)]
    return added if pinned else added + [(f"<0x{byte:02X}>", pieces.BYTE) for byte in range(256)]


def extend(model: bytes, *, pinned: bool) -> bytes:
    """Append GLM-130B's special pieces to ice_text.model.

    Args:
        model: the content of ice_text.model.
        pinned: read it as the inference code of 2022 did: newlines, tabs and runs of spaces are lost, and text without
            a piece is unk. Otherwise read it as from March 2023 on, which loses none of these.
    """
    return pieces.append(model, _added(pinned), byte_fallback=not pinned)


class IceTokenizer(SentencePieceTokenizer):
    """GLM-130B's tokenizer, made from the result of `extend`; see the module's docstring.

    The other attributes are SentencePieceTokenizer's.

    Attributes:
        eod, enc, dblock: ids of the special tokens that only this tokenizer has.
        pinned: whether it is the reading of 2022; see `extend`.
    """

    def __init__(self, model: bytes):
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = IMAGE_TOKENS + self._processor.get_piece_size()
        self.pad, self.unk, self.eos = 0, self._id("<unk>"), self._id("</s>")
        self.mask, self.gmask, self.smask, self.eod, self.sop, self.eop, self.enc, self.dblock = map(self._id, CONTROLS)
        self._names = {self._id(piece): piece.strip("<>") for piece in CONTROLS} | {self.eos: "eos"}
        self.pinned = is_pinned(self._processor)
        lengths = [0] * IMAGE_TOKENS + [len(self._bytes_of(token)) for token in range(self._processor.get_piece_size())]
        self.token_bytes = np.array(lengths, np.int32)

    def __reduce__(self) -> tuple[type[IceTokenizer], tuple[bytes]]:
        return IceTokenizer, (self.model,)

    def _id(self, piece: str) -> int:
        return IMAGE_TOKENS + self._processor.piece_to_id(piece)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        restored = _restore(piece)
        return restored.encode() if restored != piece else super()._bytes_of(token)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. A space is added before it; a [MASK] written in it stays text."""
        if not self.pinned:
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
