"""Load a tokenizer from a file: one of ours, or GLM-130B's."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glm_jax.data.tokenizers.ice import IceTokenizer, read_model
from glm_jax.data.tokenizers.sentencepiece import MASKS, SOP, Tokenizer, read_bytes
from glm_jax.errors import UserError


def load(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a workdir or a cache: one of ours, or ice_text.model with its special pieces.

    Raises:
        UserError: the file is missing or is not such a model.
    """
    model, _ = read_bytes(path)
    return _open(model, path)


def read(path: str | Path, *, pinned: bool) -> Tokenizer:
    """Read the tokenizer that `data.tokenizer.path` names; see `ice.read_model`.

    Raises:
        UserError: the file is missing or is not such a model.
    """
    return _open(read_model(path, pinned=pinned), path)


def _open(model: bytes, path: str | Path) -> Tokenizer:
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    if processor.piece_to_id("<dBLOCK>") != processor.unk_id():
        return IceTokenizer(model)
    if processor.unk_id() in (processor.piece_to_id(MASKS[0]), processor.piece_to_id(SOP)):
        raise UserError(f"{path} has no [MASK] and sop pieces: it was not trained by glm-jax")
    return Tokenizer(model)
