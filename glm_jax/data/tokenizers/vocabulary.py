"""Vocabularies of others, told by their content: tokenizer.json, vocab.txt, and vocab.json with its merges.

Each becomes a LibraryTokenizer.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Mapping
from pathlib import Path

from glm_jax.data.tokenizers import specials
from glm_jax.data.tokenizers.library import LibraryTokenizer, finish, is_finished, open_library, token_ids
from glm_jax.errors import UserError
from glm_jax.types import Json

_MERGES = (("vocab.json", "merges.txt"), ("encoder.json", "vocab.bpe"))  # how names end, and those of their merges
_BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def read(path: Path, content: bytes) -> LibraryTokenizer:
    """Read the tokenizer whose text is `content`.

    Args:
        path: the file. Its folder may hold merges, and files that say which special tokens there are.
        content: of the file.

    Raises:
        UserError: it is no tokenizer of a GLM; says what is missing.
    """
    content = content.removeprefix(codecs.BOM_UTF8)
    start = content.lstrip()[:2]
    if start[:1] == b"{" or start == b'["':
        parsed = specials.parse(path, content)
        if isinstance(parsed, dict) and isinstance(parsed.get("model"), dict):
            return _finished(path, content) if is_finished(parsed) else _tokenizer_json(path, parsed)
        if isinstance(parsed, dict) and parsed and all(type(number) is int for number in parsed.values()):
            return _byte_level(path, parsed)
        raise UserError(f"{path} is JSON, but no tokenizer.json (it has no `model`), nor a vocab.json of ids by piece")
    return _word_piece(path, content.decode("utf-8"))


def load(path: Path, content: bytes) -> LibraryTokenizer:
    """Load the tokenizer.model of a workdir or a cache, whose text is `content`.

    Raises:
        UserError: it is none.
    """
    parsed = specials.parse(path, content) if content.lstrip()[:1] == b"{" else None
    if not isinstance(parsed, dict) or not is_finished(parsed):
        raise UserError(f"{path} is not a SentencePiece model, nor a tokenizer.json that glm-jax wrote")
    return _finished(path, content)


def _finished(path: Path, content: bytes) -> LibraryTokenizer:
    """Return the tokenizer of a tokenizer.json that `finish` made, if it is whole."""
    try:
        tokenizer = LibraryTokenizer(content, path)
        tokenizer.check(path)
    except (KeyError, IndexError, StopIteration, TypeError, ValueError):
        raise UserError(f"{path} is damaged: make it again") from None
    return tokenizer


def _tokenizer_json(path: Path, content: Json) -> LibraryTokenizer:
    """Return the tokenizer of a tokenizer.json."""
    open_library(path, content)  # which checks that it has the format
    content = {"added_tokens": [], "post_processor": None} | content
    folder, ids = specials.read_folder(path.parent), token_ids(content)
    names = specials.appended(path, ids, 1 + max(ids.values(), default=-1), folder, ())
    return finish(path, content, names, folder.named, strip=False)


def _word_piece(path: Path, text: str) -> LibraryTokenizer:
    """Return the tokenizer of a vocab.txt: a piece a line, as BERT reads it."""
    lines = text.replace("\r\n", "\n").removesuffix("\n").split("\n")
    if lines[0].startswith("#version"):
        raise UserError(f"{path} holds the merges of a vocabulary: give vocab.json, beside it")
    if all("\t" in line for line in lines):
        raise UserError(f"{path} lists the pieces of a SentencePiece model: give the .model itself")
    vocabulary = {line: number for number, line in enumerate(lines)}
    for name in ("[UNK]", "[CLS]", "[MASK]", "[PAD]"):
        if name not in vocabulary:
            raise UserError(
                f"{path} is not a SentencePiece model, a tokenizer.json, nor a vocab.txt (no line is {name})"
            )
    folder = specials.read_folder(path.parent)
    cased = any(re.search("[A-Z]", line) and not re.fullmatch(r"\[.*\]|<.*>", line) for line in lines)
    lowercase = not cased if folder.lowercase is None else folder.lowercase
    content = {
        "version": "1.0", "added_tokens": [],
        "normalizer": {
            "type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True, "strip_accents": None,
            "lowercase": lowercase,
        },
        "pre_tokenizer": {"type": "BertPreTokenizer"}, "post_processor": None,
        "decoder": {"type": "WordPiece", "prefix": "##", "cleanup": True},
        "model": {
            "type": "WordPiece", "unk_token": "[UNK]", "continuing_subword_prefix": "##",
            "max_input_chars_per_word": 100, "vocab": vocabulary,
        },
    }  # fmt: skip
    names = specials.appended(path, vocabulary, len(lines), folder, specials.AFTER_BERT)
    return finish(path, content, names, folder.named, strip=False)


def _byte_level(path: Path, vocabulary: Mapping[str, int]) -> LibraryTokenizer:
    """Return the tokenizer of a vocab.json and the merges beside it, as GPT-2 and RoBERTa read them."""
    merges = _read_merges(path)
    for number, (left, right) in merges:
        absent = next((piece for piece in (left, right, left + right) if piece not in vocabulary), None)
        if absent is not None:
            raise UserError(f"{_merges_path(path)}, line {number}: {absent!r} is not in {path.name}: they are no pair")
    if sorted(vocabulary.values()) != [*range(len(vocabulary))]:
        raise UserError(f"{path}: its ids are not 0 to {len(vocabulary) - 1:,}, each once")
    folder = specials.read_folder(path.parent)
    content = {
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": _BYTE_LEVEL, "post_processor": None,
        "decoder": _BYTE_LEVEL,
        "model": {
            "type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": "",
            "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False,
            "vocab": dict(vocabulary), "merges": [f"{left} {right}" for _, (left, right) in merges],
        },
    }  # fmt: skip
    after = specials.AFTER_BERT if "<mask>" in vocabulary else specials.AFTER_GPT2
    names = specials.appended(path, vocabulary, len(vocabulary), folder, after)
    return finish(path, content, names, folder.named, strip=True)


def _merges_path(path: Path) -> Path:
    for ending, merges in _MERGES:
        if path.name.endswith(ending):
            return path.with_name(path.name.removesuffix(ending) + merges)
    return path.with_name("merges.txt")


def _read_merges(path: Path) -> list[tuple[int, tuple[str, str]]]:
    """Return the merges of a vocab.json with their lines, counted from 1."""
    beside = _merges_path(path)
    try:
        lines = beside.read_text(encoding="utf-8").split("\n")
    except FileNotFoundError:
        raise UserError(f"{path} is half a tokenizer: put its merges beside it, as {beside.name}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the merges {beside}: {error}") from None
    merges = []
    for number, line in enumerate(lines, 1):
        if not line.strip() or (number == 1 and line.startswith("#version")):
            continue
        left, space, right = line.rstrip("\r").partition(" ")
        if not space or " " in right:
            raise UserError(f"{beside}, line {number}: a merge is two pieces with a space between them")
        merges.append((number, (left, right)))
    return merges
