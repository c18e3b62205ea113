"""The tokenizer of GLM-large-chinese and GLM-10b-chinese: cog-pretrain.model, its ids, and what it does to text.

The ids of text are the 50,000 pieces' own; the special tokens follow. The model's normalisation changes text:
full-width letters and punctuation become half-width, runs of spaces and tabs one space, spaces at the ends are lost,
and a character without a piece is unk. Newlines are kept: they are written as the model's piece <n>.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import sentencepiece

from glm_jax.data.tokenizers import pieces, specials
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from glm_jax.errors import UserError

PIECES = 50_000  # of cog-pretrain.model
NEWLINE = "<n>"
FIRST_PIECES = ("<unk>", "<s>", "</s>", NEWLINE)


def lacking(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say what keeps a model from being cog-pretrain.model as it was published; empty if it is that."""
    count = processor.get_piece_size()
    return f"it has {count:,} pieces, not {PIECES:,}" if count != PIECES else _lacking_first(processor)


def lacking_extension(processor: sentencepiece.SentencePieceProcessor) -> str:
    """Say what keeps a model from being cog-pretrain.model with special tokens; empty if it is that."""
    if not 0 < processor.get_piece_size() - PIECES <= specials.MOST_ADDED:
        return f"it has {processor.get_piece_size():,} pieces, not {PIECES:,} and a few"
    if not all(map(processor.is_control, range(PIECES, processor.get_piece_size()))):
        return f"its pieces from {PIECES:,} on are not all special"
    return _lacking_first(processor)


def _lacking_first(processor: sentencepiece.SentencePieceProcessor) -> str:
    wrong = [i for i, name in enumerate(FIRST_PIECES) if processor.id_to_piece(i) != name]
    return f"its piece {wrong[0]} is not {FIRST_PIECES[wrong[0]]}" if wrong else ""


def extend(model: bytes, names: Sequence[str]) -> bytes:
    """Append special tokens to cog-pretrain.model, with ids from 50,000 on."""
    return pieces.append(model, [(name, pieces.CONTROL) for name in names])


def read(path: Path, model: bytes) -> ChineseTokenizer:
    """Read cog-pretrain.model, whose content is `model`, with the special tokens that the files beside it name.

    Raises:
        UserError: they give ids that do not follow the model's, or lack a special token, or use names of their own.
    """
    folder = specials.read_folder(path.parent)
    names = specials.appended(path, (), PIECES, folder, specials.AFTER_CHINESE)
    ids = {name: number for number, name in enumerate(names, PIECES)}
    found = specials.find(path, ids, folder.named)
    if found != specials.find(path, ids, {}):
        raise UserError(f"the files beside {path} give the special tokens other roles than GLM's Chinese models do")
    return ChineseTokenizer(extend(model, names))


class ChineseTokenizer(SentencePieceTokenizer):
    """The tokenizer made from the result of `extend`; see the module's docstring. For attributes, see Tokenizer.

    Raises:
        UserError: a special token is missing.
    """

    def __init__(self, model: bytes):
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        self._processor = sentencepiece.SentencePieceProcessor(model_proto=model)
        self.size = self._processor.get_piece_size()
        self._names = {number: self._processor.id_to_piece(number) for number in range(PIECES, self.size)}
        ids = specials.find("cog-pretrain.model", {name: number for number, name in self._names.items()}, {})
        self.pad, self.unk, self.eos, self.mask, self.gmask, self.smask, self.sop, self.eop = (
            ids[role] for role in specials.ROLES
        )
        self.prefix, self.suffix = ((ids["cls"],) if "cls" in ids else ()), (self.eos,)
        self.token_bytes = np.array([len(self._bytes_of(token)) for token in range(self.size)], np.int32)

    def __reduce__(self) -> tuple[type[ChineseTokenizer], tuple[bytes]]:
        return ChineseTokenizer, (self.model,)

    def _bytes_of(self, token: int) -> bytes:
        return b"\n" if self._processor.id_to_piece(token) == NEWLINE else super()._bytes_of(token)

    def encode(self, text: str) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. A space is added before it; a [MASK] written in it stays text."""
        return np.array(self._processor.encode(text.replace("\n", NEWLINE)), np.int32)

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Return the text of `ids`. Special tokens have their names if `specials`, else no text.

        Text between special tokens is decoded separately, without its first space.
        """
        parts: list[str] = []
        run: list[int] = []
        for token in [*map(int, ids), self.eos]:
            if token not in self._names:
                run.append(token)
                continue
            parts += [self._processor.decode(run).replace(NEWLINE, "\n"), self._names[token] if specials else ""]
            run = []
        return "".join(parts[:-1])
