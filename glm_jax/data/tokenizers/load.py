"""Load a tokenizer from a file: one of ours, GLM-130B's, or one of others, each told by its content."""

from __future__ import annotations

from pathlib import Path

import sentencepiece

from glm_jax.data.tokenizers import chinese, ice, vocabulary
from glm_jax.data.tokenizers import sentencepiece as ours
from glm_jax.data.tokenizers.chinese import ChineseTokenizer
from glm_jax.data.tokenizers.ice import IceTokenizer
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer
from glm_jax.errors import UserError

LARGEST = 64_000_000  # bytes of a tokenizer's file


def load(path: str | Path) -> Tokenizer:
    """Load the tokenizer.model of a workdir or a cache.

    Raises:
        UserError: the file is missing or is not such a model.
    """
    content = _read_file(path)
    if _is_text(content):
        return vocabulary.load(Path(path), content)
    processor = ours.open_model(path, content)
    tokenizer = _complete(content, processor)
    if tokenizer is None:
        raise _foreign(path, processor)
    return tokenizer


def read(path: str | Path, *, pinned: bool) -> Tokenizer:
    """Read the tokenizer that `data.tokenizer.path` names.

    Args:
        path: a file that `load` takes, ice_text.model, cog-pretrain.model, tokenizer.json, vocab.txt, or vocab.json.
        pinned: how to read ice_text.model; see `ice.extend`.

    Raises:
        UserError: the file is missing or is no tokenizer of a GLM, or `pinned` does not fit it.
    """
    content, path = _read_file(path), Path(path).expanduser()
    tokenizer, processor = None, None
    if not _is_text(content):
        processor = ours.open_model(path, content)
        if not ice.lacking(processor):
            return IceTokenizer(ice.extend(content, pinned=pinned))
        tokenizer = _complete(content, processor)
    if isinstance(tokenizer, IceTokenizer):
        if pinned != tokenizer.pinned:
            raise UserError(f"{path} was read with pinned={not pinned}: set data.tokenizer.pinned={not pinned}")
    elif pinned:
        raise UserError(f"data.tokenizer.pinned is for ice_text.model, {path} is not: set it to False")
    if processor is None:
        return vocabulary.read(path, content)
    if tokenizer is None and not chinese.lacking(processor):
        return chinese.read(path, content)
    if tokenizer is None:
        raise _foreign(path, processor)
    return tokenizer


def _read_file(path: str | Path) -> bytes:
    """Return the content of a tokenizer's file."""
    try:
        with Path(path).expanduser().open("rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise UserError(f"cannot read the tokenizer {path}: {error.strerror}") from None
    if not content:  # SentencePiece takes it for no model at all, and raises nothing
        raise UserError(f"the tokenizer {path} is empty: fetch it again")
    if len(content) > LARGEST:
        raise UserError(f"{path} has over {LARGEST // 1_000_000} MB: it is no tokenizer")
    return content


def _is_text(content: bytes) -> bool:
    """Whether a file is JSON or lines, not a SentencePiece model: the scores of a model's pieces have zero bytes."""
    try:
        return "\0" not in content.decode("utf-8")
    except UnicodeDecodeError:
        return False


def _complete(content: bytes, processor: sentencepiece.SentencePieceProcessor) -> Tokenizer | None:
    """Return the tokenizer of a SentencePiece model that has GLM's special tokens, or None."""
    if not ours.lacking(processor):
        return SentencePieceTokenizer(content)
    if not ice.lacking_extension(processor):
        return IceTokenizer(content)
    if not chinese.lacking_extension(processor):
        return ChineseTokenizer(content)
    return None


def _foreign(path: str | Path, processor: sentencepiece.SentencePieceProcessor) -> UserError:
    """Return the error that says what keeps a SentencePiece model from being one of those known."""
    extended = processor.piece_to_id(ice.CONTROLS[-1]) != processor.unk_id()
    not_ice = ice.lacking_extension(processor) if extended else ice.lacking(processor)
    return UserError(
        f"{path} is no tokenizer of ours ({ours.lacking(processor)}), nor ice_text.model ({not_ice}), nor "
        f"cog-pretrain.model ({chinese.lacking(processor)})"
    )
