"""GLM's special tokens in the tokenizers of others: under which names, at which ids.

A family's names and ids are those that the folder's files say, as Hugging Face's tokenizers write them; without such
files, those of the code of the original GLM (arXiv 2103.10360), which numbers its own tokens after the vocabulary's.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.types import Json

# By role, the names that mean it, the first that there is. The original GLM ends BERT's documents in [PAD], and pads
# RoBERTa's with </s>. Without [gMASK] or [sMASK] it writes [MASK] for their blanks.
NAMES = {
    "mask": ("[MASK]", "<mask>"),
    "sop": ("<|startofpiece|>", "<sop>"),
    "eop": ("<|endofpiece|>", "<eop>"),
    "eos": ("</s>", "<|endoftext|>", "<eos>", "[EOS]", "[PAD]"),
    "pad": ("[PAD]", "</s>", "<|endoftext|>", "<pad>"),
    "unk": ("[UNK]", "<unk>", "<|endoftext|>"),
    "gmask": ("[gMASK]", "[MASK]", "<mask>"),
    "smask": ("[sMASK]", "[MASK]", "<mask>"),
    "cls": ("[CLS]", "<s>"),
}
ROLES = ("pad", "unk", "eos", "mask", "gmask", "smask", "sop", "eop")
_OWN_MASKS = ("[gMASK]", "[sMASK]", "[dBLOCK]")
PIECES = ("<|startofpiece|>", "<|endofpiece|>")
AFTER_BERT = (*PIECES, *_OWN_MASKS)  # and after RoBERTa's vocabulary
AFTER_GPT2 = (*PIECES, "[CLS]", "[MASK]", "[SEP]", "[UNK]", *_OWN_MASKS)
# The id after [UNK] stays unused. The code of GLM-10b-chinese gave [gMASK] the id of <|endofpiece|>; these are the ids
# of GLM-large-chinese, and of both models in Hugging Face's format, with a copy of that row of the embedding.
AFTER_CHINESE = (
    "<|endoftext|>", "[SEP]", "[CLS]", "[MASK]", "[UNK]", "[UNUSED1]", *PIECES, "[sMASK]", "[gMASK]", "[dBLOCK]",
)  # fmt: skip
MOST_ADDED = 4096  # ids after the vocabulary


@dataclass(frozen=True)
class Folder:
    """What the files beside a vocabulary say of its special tokens.

    Attributes:
        added: ids by name.
        named: names by role, of ROLES and `cls`.
        lowercase: whether text is lowercased, or None if no file says so.
    """

    added: Mapping[str, int] = field(default_factory=dict)
    named: Mapping[str, str] = field(default_factory=dict)
    lowercase: bool | None = None


def read_folder(folder: Path) -> Folder:
    """Read added_tokens.json, special_tokens_map.json and tokenizer_config.json, as far as they are there.

    Raises:
        UserError: one of them cannot be read or does not have the form that Hugging Face gives it.
    """
    config, names = (_object(folder / f"{name}.json") for name in ("tokenizer_config", "special_tokens_map"))
    try:
        added = {str(token["content"]): int(id) for id, token in config.get("added_tokens_decoder", {}).items()}
    except (AttributeError, KeyError, TypeError, ValueError):
        raise UserError(f"{folder}/tokenizer_config.json: added_tokens_decoder does not map ids to tokens") from None
    for name, number in _object(folder / "added_tokens.json").items():
        if isinstance(number, bool) or not isinstance(number, int):
            raise UserError(f"{folder}/added_tokens.json: the id of {name} is {number!r}, not a number")
        added[name] = number
    named = {}
    for role in NAMES:
        token = names.get(f"{role}_token") or config.get(f"{role}_token")
        content = token.get("content") if isinstance(token, dict) else token
        if isinstance(content, str):
            named[role] = content
    lowercase = config.get("do_lower_case")
    return Folder(added, named, lowercase if isinstance(lowercase, bool) else None)


def _object(path: Path) -> Json:
    """Read a file of one JSON object; empty if there is no such file."""
    try:
        content = parse(path, path.read_bytes())
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    if not isinstance(content, dict):
        raise UserError(f"{path} does not hold a JSON object")
    return content


def parse(path: str | Path, content: bytes) -> object:
    """Parse the JSON in the file `path`. Raises UserError if it is none."""
    try:
        return json.loads(content)
    except RecursionError:
        raise UserError(f"{path} is nested too deeply") from None
    except ValueError as error:  # neither JSON nor UTF-8
        raise UserError(f"{path} is not valid JSON: {error}") from None


def appended(path: str | Path, known: Iterable[str], size: int, folder: Folder, after: Iterable[str]) -> list[str]:
    """Return the names of the special tokens with the ids `size`, `size` + 1, ..., which follow a vocabulary.

    Args:
        path: the vocabulary's file, for messages.
        known: the vocabulary's names.
        size: its number of ids.
        folder: what is beside it.
        after: what the original GLM appends, where the folder names no added tokens and the vocabulary has no sop.

    Raises:
        UserError: the folder's ids are the vocabulary's, are given twice, or lie far behind it.
    """
    have = set(known)
    added = {name: number for name, number in folder.added.items() if name not in have}
    if not added:
        return [] if have.intersection(NAMES["sop"]) else [name for name in after if name not in have]
    names: dict[int, str] = {}
    for name, number in added.items():
        if number in names or not size <= number < size + MOST_ADDED:
            other = f"that of {names[number]}, too" if number in names else f"not one after the {size:,} of {path}"
            raise UserError(f"{Path(path).parent}: the id of the added token {name} is {number:,}, {other}")
        names[number] = name
    return [names.get(number, f"[UNUSED{number}]") for number in range(size, max(names) + 1)]


def find(path: str | Path, ids: Mapping[str, int], named: Mapping[str, str]) -> dict[str, int]:
    """Return the ids of the special tokens by role; `cls` only if there is one.

    Args:
        path: the tokenizer's file, for messages.
        ids: of all its tokens, by name.
        named: names by role that take precedence.

    Raises:
        UserError: a role has no token, or a name of the folder's has no id.
    """
    roles = {}
    for role, names in NAMES.items():
        if (name := named.get(role)) is not None and name not in ids:
            raise UserError(f"{path} has no token {name}, which the files beside it name as {role}_token")
        found = next((ids[name] for name in ([name] if name else names) if name in ids), None)
        if found is not None:
            roles[role] = found
        elif role != "cls":
            raise UserError(f"{path} is no tokenizer of a GLM: it has no token {' or '.join(names[:2])} ({role})")
    return roles
