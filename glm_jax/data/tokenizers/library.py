"""Tokenizers in the format of Hugging Face's `tokenizers` library, tokenizer.json, with GLM's special tokens.

The post-processor of the file holds what GLM adds to the format: the ids of the special tokens by role, and what stands
before and after a context. So the file is complete, and the library reads it, too.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from glm_jax.data.tokenizers import specials
from glm_jax.errors import UserError
from glm_jax.types import Json

if TYPE_CHECKING:
    import tokenizers

WORD_START, CONTINUES = "\u2581", "##"  # how pieces write a space; how WordPiece marks the rest of a word
MOST_TOKENS = 1 << 22  # ids are below this: an array of all tokens stays small
_TEMPLATE = "TemplateProcessing"


class LibraryTokenizer:
    """The tokenizer made from the result of `finish`. For attributes, see Tokenizer.

    `token_bytes` is exact for byte-level BPE. Where a tokenizer normalises text (BERT's lowercases it and drops
    spaces), it counts the bytes of the pieces, so that bits per byte are approximate.

    Raises:
        UserError: the library is missing, or it cannot read the model.
    """

    strips_before_blanks: bool

    def __init__(self, model: bytes, path: str | Path = "the tokenizer"):
        """Open a model; `path` is where it is, for messages."""
        self.model = model
        self.digest = hashlib.sha256(model).hexdigest()
        content = json.loads(model)
        self._library = open_library(path, content)
        self.size = 1 + max(self._library.get_vocab().values())
        processor = content["post_processor"]
        ids = {role: token["ids"][0] for role, token in processor["special_tokens"].items()}
        self.pad, self.unk, self.eos, self.mask, self.gmask, self.smask, self.sop, self.eop = (
            int(ids[role]) for role in specials.ROLES
        )
        single = processor["single"]
        text = next(place for place, part in enumerate(single) if "Sequence" in part)
        self.prefix: tuple[int, ...] = tuple(ids[part["SpecialToken"]["id"]] for part in single[:text])
        self.suffix: tuple[int, ...] = tuple(ids[part["SpecialToken"]["id"]] for part in single[text + 1 :])
        added = self._library.get_added_tokens_decoder()
        self.strips_before_blanks = added[self.mask].lstrip
        self.token_bytes = np.zeros(self.size, np.int32)
        byte_level = _is_byte_level(content)
        for piece, token in self._library.get_vocab().items():
            if token not in added:
                self.token_bytes[token] = len(piece) if byte_level else _bytes(piece)
            elif not added[token].special:
                self.token_bytes[token] = len(piece.encode())

    def check(self, path: str | Path) -> None:
        """Check that ids are those that the file `path` gives, and that special tokens written in a text stay text.

        Raises:
            UserError: they are not, or do not.
        """
        content = json.loads(self.model)
        for name, token in token_ids(content).items():
            if self._library.token_to_id(name) != token:
                raise UserError(f"{path}: the id {token} of {name} is not the next one after those before it")
        for name in {token["tokens"][0] for token in content["post_processor"]["special_tokens"].values()}:
            token = self._library.token_to_id(name)
            if token != self.unk and any(token in self.encode(text) for text in (name, f"a {name} b", f"a{name}b")):
                raise UserError(f"{path} reads {name} in a text as a special token: documents could not hold it")

    def __reduce__(self) -> tuple[type[LibraryTokenizer], tuple[bytes]]:
        return LibraryTokenizer, (self.model,)

    def encode(self, text: str, /) -> np.ndarray:
        """Return the ids of `text` as int32 [S]. Special tokens written in the text stay text."""
        return np.array(self._library.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, ids: Iterable[int], /, *, specials: bool = False) -> str:
        """Return the text of `ids`, as the library decodes it. Special tokens have their names if `specials`."""
        return self._library.decode([*map(int, ids)], skip_special_tokens=not specials)


def open_library(path: str | Path, content: Json) -> tokenizers.Tokenizer:
    """Read the parsed tokenizer.json of the file `path` with the library; special tokens in text stay text.

    Raises:
        UserError: the library is missing, or it cannot read the content.
    """
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # it warns where processes fork; ours share texts anyway
    try:
        import tokenizers
    except ImportError:
        raise UserError(f"{path} needs the tokenizers library: pip install -e '.[huggingface]'") from None
    try:
        library = tokenizers.Tokenizer.from_str(json.dumps(content))
    except Exception as error:  # the library raises no other type
        raise UserError(f"{path} is not a tokenizer of the tokenizers library: {error}") from None
    if (largest := max(library.get_vocab().values(), default=-1)) >= MOST_TOKENS:
        raise UserError(f"{path} has a token with the id {largest:,}: it is no tokenizer")
    library.encode_special_tokens = True
    return library


def finish(
    path: str | Path, content: Json, names: Iterable[str], named: Mapping[str, str], *, strip: bool
) -> LibraryTokenizer:
    """Make a tokenizer of a parsed tokenizer.json, with special tokens.

    Args:
        path: the file, for messages.
        content: a parsed tokenizer.json. A post-processor that puts special tokens around a text gives the prefix and
            suffix; without one they are [CLS], if there is one, and eos.
        names: of tokens to append, in the order of their ids.
        named: names by role that take precedence; see `specials.find`.
        strip: whether spaces before a blank belong to the blank.

    Raises:
        UserError: a special token is missing, or written in text becomes a special token, or the library cannot read
            the content.
    """
    content = content | {"truncation": None, "padding": None}
    ids = token_ids(content)
    first = 1 + max(ids.values())
    ids |= {name: number for number, name in enumerate(names, first)}
    roles = specials.find(path, ids, named)
    prefix, suffix = _around(path, content, roles)
    tokens = {number: name for name, number in ids.items()}
    blanks = {roles[role] for role in ("mask", "gmask", "smask")}
    added = {token["id"]: token for token in content["added_tokens"]}
    separators = [ids[name] for name in ("[SEP]",) if name in ids]  # which no text has, and no role
    for number in {*range(first, 1 + max(ids.values())), *roles.values(), *prefix, *suffix, *separators}:
        lstrip = added.get(number, {}).get("lstrip", False) or (strip and number in blanks)
        added[number] = {
            "id": number, "content": tokens[number], "single_word": False, "lstrip": lstrip, "rstrip": False,
            "normalized": False, "special": True,
        }  # fmt: skip
    content = content | {
        "post_processor": _processor(prefix, suffix, roles, tokens),
        "added_tokens": [added[number] for number in sorted(added)],
    }  # fmt: skip
    model = json.dumps(content, ensure_ascii=False, separators=(",", ":"), sort_keys=True).encode()
    tokenizer = LibraryTokenizer(model, path)
    tokenizer.check(path)
    return tokenizer


def token_ids(content: Json) -> dict[str, int]:
    """Return the ids by name of a parsed tokenizer.json: of its model, and of its added tokens."""
    vocabulary = content["model"]["vocab"]
    if isinstance(vocabulary, list):  # Unigram's, of names and scores
        vocabulary = {name: number for number, (name, _) in enumerate(vocabulary)}
    return vocabulary | {token["content"]: token["id"] for token in content["added_tokens"]}


def _processor(
    prefix: Iterable[int], suffix: Iterable[int], roles: Mapping[str, int], tokens: Mapping[int, str]
) -> Json:
    """Return the post-processor that puts tokens around a text, and holds the special ones by role."""
    before, after = ({f"{place}{i}": token for i, token in enumerate(ids)} for place, ids in
                     (("prefix", prefix), ("suffix", suffix)))  # fmt: skip
    first, last = ([{"SpecialToken": {"id": name, "type_id": 0}} for name in part] for part in (before, after))
    single = [*first, {"Sequence": {"id": "A", "type_id": 0}}, *last]
    held = {
        name: {"id": name, "ids": [token], "tokens": [tokens[token]]}
        for name, token in {**roles, **before, **after}.items()
    }
    pair = [*single, {"Sequence": {"id": "B", "type_id": 1}}]  # the format asks for it; nothing here uses pairs
    return {"type": _TEMPLATE, "single": single, "pair": pair, "special_tokens": held}


def is_finished(content: Json) -> bool:
    """Whether a parsed tokenizer.json is one that `finish` made."""
    processor = content.get("post_processor")
    held = processor.get("special_tokens") if isinstance(processor, dict) else None
    return isinstance(held, dict) and {*specials.ROLES} <= {*held}


def _around(path: str | Path, content: Json, roles: Mapping[str, int]) -> tuple[list[int], list[int]]:
    """Return what the library puts before and after a text, or [CLS] and eos if it puts nothing."""
    if content["post_processor"] is not None:
        library = open_library(path, content)
        plain, whole = (library.encode("a", add_special_tokens=special).ids for special in (False, True))
        # GLM-4 begins a chat in [gMASK] sop, which blanks have elsewhere.
        blanks = {roles[role] for role in ("mask", "gmask", "smask", "sop", "eop")}
        for start in range(1 + len(whole) - len(plain)):
            if len(whole) > len(plain) and whole[start : start + len(plain)] == plain:
                before, after = whole[:start], whole[start + len(plain) :]
                return [token for token in before if token not in blanks], [t for t in after if t not in blanks]
    return [roles[role] for role in ("cls",) if role in roles], [roles["eos"]]


def _is_byte_level(content: Json) -> bool:
    """Whether pieces are written in the alphabet of byte-level BPE: one character for each byte."""
    steps = [content.get("pre_tokenizer") or {}, content.get("decoder") or {}]
    steps += [inner for step in steps for inner in [*step.get("pretokenizers", []), *step.get("decoders", [])]]
    return any(step.get("type") == "ByteLevel" for step in steps)


def _bytes(piece: str) -> int:
    """Return the number of bytes of text that a piece stands for, if it is not byte-level."""
    if len(piece) == 6 and piece.startswith("<0x") and piece.endswith(">"):  # a byte, as SentencePiece writes it
        return 1
    return len(piece.removeprefix(CONTINUES).replace(WORD_START, " ").encode())
