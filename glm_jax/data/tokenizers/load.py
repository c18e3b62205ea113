"""Load a tokenizer from a file: one of ours, or GLM-130B's."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glm_jax.data.tokenizers.ice import IceTokenizer, foreign, lacking_extension, read_model
from glm_jax.data.tokenizers.sentencepiece import Tokenizer, lacking, read_bytes


def load(path: str | Path) -> Tokenizer:
    """Load the tokenizer of a workdir or a cache: one of ours, or ice_text.model with its special pieces.

    Raises:
        UserError: the file is missing or is not such a model.
    """
    model, processor = read_bytes(path)
    if not lacking(processor):
        return Tokenizer(model)
    if not lacking_extension(processor):
        return IceTokenizer(model)
    raise foreign(path, processor)


def read(path: str | Path, *, pinned: bool) -> Tokenizer:
    """Read the tokenizer that `data.tokenizer.path` names; see `ice.read_model`.

    Raises:
        UserError: the file is missing or is not such a model.
    """
    model = read_model(path, pinned=pinned)
    known = sentencepiece.SentencePieceProcessor(model_proto=model)
    return IceTokenizer(model) if not lacking_extension(known) else Tokenizer(model)
