"""SentencePiece with GLM's special tokens: training on any text, and a lossless encoding."""

from __future__ import annotations

import functools
import hashlib
import io
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from glm_jax.errors import UserError

# Ids 0 to 7, in this order. None of them ever matches text, so a literal "[MASK]" stays text.
PAD, UNK, EOS = "pad", "unk", "eos"
MASKS = ("[MASK]", "[gMASK]", "[sMASK]")
SOP, EOP = "sop", "eop"  # start and end of a piece (a target)
SPECIALS = (PAD, UNK, EOS, *MASKS, SOP, EOP)
SMALLEST_VOCABULARY = len(SPECIALS) + 256 + 2  # the specials, the byte pieces, and something to learn

TRAINING_BYTES = 10_000_000  # of text the trainer reads; more changes few pieces and costs time and memory
SENTENCE_CHARACTERS = 2000  # documents are cut to about this length before training; pieces do not cross the cuts
CHARACTER_COVERAGE = 0.9995  # share of the text's characters that get pieces; the rest is spelt in bytes
UNTRAINABLE = "\0\t\u2581\u2585"  # the trainer drops or reinterprets them; encoding spells them in bytes
WORD_START = "\u2581"  # how SentencePiece writes a space, so it cannot be encoded as itself


def check_size(vocab_size: int) -> None:
    """Raise UserError if a vocabulary is too small for the special and byte pieces."""
    if vocab_size < SMALLEST_VOCABULARY:
        raise UserError(
            f"data.tokenizer.vocab_size is {vocab_size}, it must be at least {SMALLEST_VOCABULARY}: "
            "special and byte pieces come first"
        )


def train(documents: Iterable[str], vocab_size: int) -> bytes:
    """Train a unigram model with byte fallback. The same documents give the same bytes.

    Whitespace is kept, and runs of it get pieces of their own. At most half of the learned pieces are single
    characters, so that a text with thousands of them (Chinese) still gets words.

    Args:
        documents: text in the proportions that the pieces should serve. Only the first TRAINING_BYTES are
            used, so shuffle first.
        vocab_size: number of pieces, including specials and byte pieces. A small text may give fewer.

    Returns:
        The serialised SentencePiece model.

    Raises:
        UserError: the vocabulary is too small for the special and byte pieces, or there is no text.
    """
    check_size(vocab_size)
    sentences = _keep_frequent(list(_sentences(documents)), (vocab_size - len(SPECIALS) - 256) // 2)
    if not any(sentence.strip() for sentence in sentences):
        raise UserError("there is no text to train a tokenizer on")
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(sentences), model_writer=model, model_type="unigram", vocab_size=vocab_size,
        hard_vocab_limit=False, byte_fallback=True, character_coverage=1.0,
        normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
        allow_whitespace_only_pieces=True, max_sentence_length=1 << 30,
        pad_id=0, unk_id=1, eos_id=2, bos_id=-1, pad_piece=PAD, unk_piece=UNK, eos_piece=EOS,
        control_symbols=[*MASKS, SOP, EOP],
        num_threads=2,  # fixed: the order of float sums depends on it
        minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


def _sentences(documents: Iterable[str]) -> Iterator[str]:
    """Yield the first TRAINING_BYTES of text, cut into runs of lines of about SENTENCE_CHARACTERS each."""
    left = TRAINING_BYTES
    for document in documents:
        start = 0
        while start < len(document):
            end = start + SENTENCE_CHARACTERS
            newline = document.rfind("\n", start, end)
            if end < len(document) and newline > start:
                end = newline  # the newline starts the next sentence, where the trainer does not trim it
            yield document[start:end]
            left -= len(document[start:end].encode())
            if left <= 0:
                return
            start = end


def _keep_frequent(sentences: Sequence[str], limit: int) -> list[str]:
    """Cut sentences at characters that get no piece, so that at most `limit` distinct characters are left.

    The trainer's own coverage option goes no lower than 98%; a small vocabulary for Chinese needs less.
    """
    counts: Counter[str] = Counter()
    for sentence in sentences:
        counts.update(sentence)
    for character in UNTRAINABLE:
        counts.pop(character, None)
    ranked = sorted(counts, key=lambda character: (-counts[character], character))
    covered = np.cumsum([counts[character] for character in ranked])
    enough = int(np.searchsorted(covered, CHARACTER_COVERAGE * counts.total())) + 1
    cuts = dict.fromkeys(map(ord, [*UNTRAINABLE, *ranked[min(limit, enough) :]]), "\0")
    return [part for sentence in sentences for part in sentence.translate(cuts).split("\0") if part]


def open_model(path: str | Path, model: bytes) -> sentencepiece.SentencePieceProcessor:
    """Open the content of the file `path`. Raises UserError if it is no SentencePiece model."""
    try:
        processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        processor.id_to_piece([*range(processor.get_piece_size()), processor.unk_id()])
    except (RuntimeError, UnicodeDecodeError, IndexError):  # a piece, or the library's message, is not UTF-8; no unk
        raise UserError(f"{path} is not a SentencePiece model") from None
    return processor


def lacking(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say in a few words what keeps a model from being one that `train` makes; empty if it is one."""
    size = processor.get_piece_size()
    for number, name in enumerate(SPECIALS):
        if number >= size or processor.id_to_piece(number) != name:
            return f"its piece {number} is not {name}"
        if not (processor.is_unknown(number) if name == UNK else processor.is_control(number)):
            return f"{name} is an ordinary piece"
    for byte in range(256):
        number = processor.piece_to_id(f"<0x{byte:02X}>")
        if not processor.is_byte(number):
            return f"it has no piece for the byte 0x{byte:02X}"
    if processor.normalize(_every_character()).replace(WORD_START, " ") != _every_character():
        return "it normalises text"
    if processor.encode("\0") != [processor.piece_to_id("<0x00>")]:
        return "it does not spell unknown text in bytes"
    return ""


@functools.cache
def _every_character() -> str:
    """Return spaces in front, in a run and at the end, and all characters but half pairs and WORD_START."""
    codes = np.arange(0x110000, dtype="<u4")
    halves = (codes >= 0xD800) & (codes < 0xE000)
    return f"  a  {codes[~halves & (codes != ord(WORD_START))].tobytes().decode('utf-32-le')}  "


class SentencePieceTokenizer:
    """A trained model. `decode(encode(text)) == text` for any valid Unicode text.

    Attributes:
        model: the serialised SentencePiece model.
        digest: sha256 of `model`, hexadecimal.
        size: number of pieces.
        pad, unk, eos, mask, gmask, smask, sop, eop: ids of the special tokens.
        token_bytes: int32 [size], the number of UTF-8 bytes of text that each id stands for; 0 for special tokens.
        prefix, suffix, strips_before_blanks: see Tokenizer; of none of these models.
    """

    prefix: tuple[int, ...] = ()
    suffix: tuple[int, ...] = ()
    strips_before_blanks = False

    def __init__(self, model: bytes):
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size: int = self._processor.get_piece_size()
        self.pad, self.unk, self.eos, self.mask, self.gmask, self.smask, self.sop, self.eop = (
            self._processor.piece_to_id(piece) for piece in SPECIALS
        )
        self._text = [self._bytes_of(token) for token in range(self.size)]
        self.token_bytes = np.array([len(text) for text in self._text], np.int32)
        self._word_start = [self._processor.piece_to_id(f"<0x{byte:02X}>") for byte in WORD_START.encode()]

    def __reduce__(self) -> tuple[type[SentencePieceTokenizer], tuple[bytes]]:
        return SentencePieceTokenizer, (self.model,)

    def _bytes_of(self, token: int) -> bytes:
        piece = self._processor.id_to_piece(token)
        if self._processor.is_byte(token):
            return bytes([int(piece[1:-1], 16)])  # "<0x0A>"
        if self._processor.is_control(token) or self._processor.is_unknown(token):
            return b""
        return piece.replace(WORD_START, " ").encode()

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. Special tokens written in the text stay text."""
        ids: list[int] = []
        for index, part in enumerate(text.split(WORD_START)):
            ids += self._word_start * (index > 0) + self._processor.encode(part)
        return np.array(ids, np.int32)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Return the text of `ids`. Special tokens have their names if `specials`, else no text.

        Bytes that are not UTF-8, such as those of a cut character, become U+FFFD.
        """
        names = {self._processor.piece_to_id(piece): piece.encode() for piece in SPECIALS} if specials else {}
        return b"".join(names.get(int(token), self._text[token]) for token in ids).decode("utf-8", "replace")
