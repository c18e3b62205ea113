"""Tokenizers that others made: their ids are the libraries', GLM's special tokens where its own code has them."""

from __future__ import annotations

import builtins
import io
import json
import pickle
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import sentencepiece
import tokenizers
import vocabularies
from tokenizers import decoders, models, normalizers, pre_tokenizers

from glm_jax.data.tokenizers import chinese, library
from glm_jax.data.tokenizers.chinese import ChineseTokenizer
from glm_jax.data.tokenizers.library import LibraryTokenizer
from glm_jax.data.tokenizers.load import LARGEST, load, read
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError

Encode = Callable[[str], list[int]]
Decode = Callable[[list[int]], str]

ROLES = ("pad", "unk", "eos", "mask", "gmask", "smask", "sop", "eop")


def of_library(made: tokenizers.Tokenizer) -> tuple[Encode, Decode]:
    return lambda text: made.encode(text).ids, made.decode


def chinese_file(folder: Path) -> Path:
    (folder / "cog-pretrain.model").write_bytes(vocabularies.chinese())
    return folder / "cog-pretrain.model"


@pytest.fixture(autouse=True)
def few_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small Chinese model for the official one."""
    made = sentencepiece.SentencePieceProcessor(model_proto=vocabularies.chinese())
    monkeypatch.setattr(chinese, "PIECES", made.get_piece_size())


def oracle(path: Path) -> tuple[Encode, Decode]:
    """Return what the libraries themselves make of a vocabulary, without any special token."""
    if path.name == "tokenizer.json":
        content = json.loads(path.read_text("utf-8"))
        made = tokenizers.Tokenizer.from_str(json.dumps(content | {"added_tokens": []}))
    elif path.suffix == ".model":
        processor = sentencepiece.SentencePieceProcessor(model_file=str(path))
        return lambda text: processor.encode(text), lambda ids: processor.decode(ids).replace("<n>", "\n")
    elif path.suffix == ".txt":
        pieces = path.read_text("utf-8").split("\n")[:-1]
        vocabulary = {piece: number for number, piece in enumerate(pieces)}
        made = tokenizers.Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
        made.normalizer, made.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
        made.decoder = decoders.WordPiece()
    else:
        merges = str(path).replace("vocab.json", "merges.txt")
        made = tokenizers.Tokenizer(models.BPE.from_file(str(path), merges))
        made.pre_tokenizer, made.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    return of_library(made)


FORMS = {
    "vocab.txt": vocabularies.word_piece,
    "gpt2": vocabularies.gpt2,
    "roberta": vocabularies.roberta,
    "tokenizer.json": vocabularies.library_file,
    "chinese": chinese_file,
}
forms = pytest.mark.parametrize("form", FORMS)


@forms
def test_texts_have_the_ids_of_the_library(form: str, tmp_path: Path):
    path = FORMS[form](tmp_path)
    encode, decode = oracle(path)
    tokenizer = read(path, pinned=False)
    special = {getattr(tokenizer, role) for role in ROLES} - {tokenizer.unk}
    for text in vocabularies.lines(1000):
        ids = tokenizer.encode(text)  # [S]
        assert ids.dtype == np.int32 and ids.tolist() == encode(text), text
        assert special.isdisjoint(ids.tolist()), text
        plain = [token for token in ids.tolist() if token != tokenizer.unk]
        assert tokenizer.decode(np.array(plain, np.int32)) == decode(plain), text
        if form in ("gpt2", "roberta", "tokenizer.json"):  # byte-level: nothing is lost
            assert tokenizer.decode(ids) == text and tokenizer.token_bytes[ids].sum() == len(text.encode())


@forms
def test_newlines_emoji_and_mixed_words(form: str, tmp_path: Path):
    tokenizer = read(FORMS[form](tmp_path), pinned=False)
    texts = ["dog\nfox", "天下dog分久", "dog😀"]
    backs = {
        "chinese": ["dog\nfox", "天下dog分久", "dog ⁇ "],  # SentencePiece's sign for unk
        "vocab.txt": ["dog fox", "天 下 dog 分 久", ""],  # the whole word is unk
    }
    assert [tokenizer.decode(tokenizer.encode(text)) for text in texts] == backs.get(form, texts)
    assert tokenizer.encode("").shape == (0,) and tokenizer.decode([]) == ""


@forms
def test_one_file_holds_all_of_it(form: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The same files elsewhere, a copy of the model, and another process are the same tokenizer."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    path = FORMS[form](tmp_path / "a")
    tokenizer = read(path, pinned=False)
    for file in (tmp_path / "a").iterdir():
        (tmp_path / "b" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path / "b")
    kept = tmp_path / "tokenizer.model"
    kept.write_bytes(tokenizer.model)
    same: list[Tokenizer] = [read(path.name, pinned=False), load(kept), read(kept, pinned=False)]
    for copy in (*same, pickle.loads(pickle.dumps(tokenizer))):
        assert type(copy) is type(tokenizer) and copy.digest == tokenizer.digest and copy.size == tokenizer.size
        for name in (*ROLES, "prefix", "suffix", "strips_before_blanks"):
            assert getattr(copy, name) == getattr(tokenizer, name), name
        assert copy.encode("a\n[MASK] 天下").tolist() == tokenizer.encode("a\n[MASK] 天下").tolist()
        assert (copy.token_bytes == tokenizer.token_bytes).all()


def after(tokenizer: Tokenizer, size: int) -> dict[str, int]:
    """Return the ids of the special tokens, counted from the first after a vocabulary of `size`; negative: inside."""
    return {role: getattr(tokenizer, role) - size for role in ROLES}


def test_special_tokens_are_where_the_original_code_has_them(tmp_path: Path):
    """The ids of each family, after vocabularies of 30,522, 50,257, 50,265 and 50,000 in the published models."""
    (tmp_path / "r").mkdir()
    bert = read(path := vocabularies.word_piece(tmp_path), pinned=False)
    size = len(path.read_text("utf-8").splitlines())
    assert after(bert, size) == {"pad": -size, "eos": -size, "unk": 1 - size, "mask": 4 - size,
                                 "sop": 0, "eop": 1, "gmask": 2, "smask": 3}  # fmt: skip
    assert (bert.prefix, bert.suffix, bert.size) == ((2,), (0,), size + 5) and not bert.strips_before_blanks
    gpt2 = read(path := vocabularies.gpt2(tmp_path), pinned=False)
    size = len(json.loads(path.read_text("utf-8")))
    assert after(gpt2, size) == {"pad": -size, "eos": -size, "sop": 0, "eop": 1, "mask": 3, "unk": 5, "gmask": 6,
                                 "smask": 7}  # fmt: skip
    assert (gpt2.prefix, gpt2.suffix, gpt2.size) == ((size + 2,), (0,), size + 9) and gpt2.strips_before_blanks
    roberta = read(path := vocabularies.roberta(tmp_path / "r"), pinned=False)
    size = len(json.loads(path.read_text("utf-8")))
    assert after(roberta, size) == {"pad": 2 - size, "eos": 2 - size, "unk": 3 - size, "mask": 4 - size, "sop": 0,
                                    "eop": 1, "gmask": 2, "smask": 3}  # fmt: skip
    assert (roberta.prefix, roberta.suffix, roberta.size) == ((0,), (2,), size + 5) and roberta.strips_before_blanks
    cog, size = read(chinese_file(tmp_path), pinned=False), chinese.PIECES
    assert after(cog, size) == {"pad": 0, "eos": 0, "mask": 3, "unk": 4, "sop": 6, "eop": 7, "smask": 8, "gmask": 9}
    assert (cog.prefix, cog.suffix, cog.size) == ((size + 2,), (size,), size + 11) and not cog.strips_before_blanks


def added(folder: Path, first: int, *names: str) -> None:
    (folder / "added_tokens.json").write_text(json.dumps({name: first + i for i, name in enumerate(names)}))


def test_the_folder_says_where_special_tokens_are(tmp_path: Path):
    path = vocabularies.gpt2(tmp_path)
    size = len(json.loads(path.read_text("utf-8")))
    names = ["[MASK]", "[CLS]", "<|startofpiece|>", "<|endofpiece|>", "[UNK]", "<pad>"]
    added(tmp_path, size + 2, *names)  # and the first two ids after the vocabulary stay unused
    (tmp_path / "special_tokens_map.json").write_text(json.dumps({"pad_token": {"content": "<pad>"}}))
    tokenizer = read(path, pinned=False)
    assert after(tokenizer, size) == {"mask": 2, "sop": 4, "eop": 5, "unk": 6, "pad": 7, "eos": -size, "gmask": 2,
                                      "smask": 2}  # fmt: skip
    assert tokenizer.prefix == (size + 3,) and tokenizer.size == size + 8
    (tmp_path / "added_tokens.json").unlink()
    decoder = {str(size + 2 + i): {"content": name} for i, name in enumerate(names)}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    assert read(path, pinned=False).digest == tokenizer.digest

    (tmp_path / "c").mkdir()
    cog = chinese_file(tmp_path / "c")
    order = ["<|endoftext|>", "[CLS]", "[MASK]", "<|startofpiece|>", "<|endofpiece|>", "[gMASK]", "[UNK]"]
    added(tmp_path / "c", chinese.PIECES, *order)
    assert after(read(cog, pinned=False), chinese.PIECES) == {
        "pad": 0, "eos": 0, "mask": 2, "smask": 2, "sop": 3, "eop": 4, "gmask": 5, "unk": 6,
    }  # fmt: skip


def test_bert_lowercases_unless_its_vocabulary_or_its_folder_says_otherwise(tmp_path: Path):
    path = vocabularies.word_piece(tmp_path)
    assert (read(path, pinned=False).encode("DOG") == read(path, pinned=False).encode("dog")).all()
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": false}')
    assert read(path, pinned=False).encode("D").tolist() == [1]  # unk
    (tmp_path / "tokenizer_config.json").unlink()
    path.write_text(path.read_text("utf-8") + "D\n", "utf-8")
    cased = read(path, pinned=False)
    assert cased.decode(cased.encode("D")) == "D"


def test_the_bytes_of_tokens(tmp_path: Path):
    bert = read(vocabularies.word_piece(tmp_path), pinned=False)
    words = bert.encode("dog 天下 jumps foxes")  # the last is fox ##e ##s
    assert len(words) > 5 and bert.token_bytes[words].sum() == len("dog天下jumpsfoxes".encode())
    cog = read(chinese_file(tmp_path), pinned=False)
    assert cog.token_bytes[cog.encode("dog\n天下")].sum() == len(" dog\n天下".encode())
    for tokenizer in (bert, cog):
        ids = [tokenizer.pad, tokenizer.mask, tokenizer.gmask, tokenizer.sop, tokenizer.eop, *tokenizer.prefix]
        ids.append(3 if tokenizer is bert else chinese.PIECES + 1)  # [SEP]
        assert (
            tokenizer.decode(ids).strip() == ""
            and not tokenizer.token_bytes[ids].any()
            and tokenizer.token_bytes.shape == (tokenizer.size,)
        )


@forms
def test_special_tokens_have_names_when_asked_for(form: str, tmp_path: Path):
    tokenizer = read(FORMS[form](tmp_path), pinned=False)
    ids = [*tokenizer.prefix, *tokenizer.encode("dog"), tokenizer.mask, tokenizer.sop, *tokenizer.suffix]
    assert tokenizer.decode(ids).strip() == "dog"
    named = tokenizer.decode(ids, specials=True)
    assert "dog" in named and ("[MASK]" in named or "<mask>" in named) and ("sop" in named or "startofpiece" in named)


def test_a_template_of_the_file_gives_prefix_and_suffix(tmp_path: Path):
    """BERT's fast tokenizer puts [CLS] and [SEP] around a text; GLM-4's [gMASK] <sop>, which no context begins in."""
    tokenizer = read(vocabularies.library_file(tmp_path), pinned=False)
    content = json.loads((tmp_path / "tokenizer.json").read_text("utf-8"))
    ids = {token["content"]: token["id"] for token in content["added_tokens"]}
    assert (tokenizer.prefix, tokenizer.suffix) == ((ids["[CLS]"],), (ids["<|endoftext|>"],))
    for before, behind, prefix, suffix in (
        (["[CLS]"], ["[UNK]"], (ids["[CLS]"],), (ids["[UNK]"],)),
        (["[gMASK]", "<sop>"], [], (), ()),
    ):
        parts = [[{"SpecialToken": {"id": name, "type_id": 0}} for name in names] for names in (before, behind)]
        single = [*parts[0], {"Sequence": {"id": "A", "type_id": 0}}, *parts[1]]
        held = {name: {"id": name, "ids": [ids[name]], "tokens": [name]} for name in (*before, *behind)}
        template = {"type": "TemplateProcessing", "single": single, "pair": single, "special_tokens": held}
        template["pair"] = [*single, {"Sequence": {"id": "B", "type_id": 1}}]
        padding = {"strategy": {"Fixed": 9}, "direction": "Right", "pad_to_multiple_of": None, "pad_id": ids["[PAD]"],
                   "pad_type_id": 0, "pad_token": "[PAD]"}  # fmt: skip
        path = vocabularies.library_file(tmp_path, post_processor=template, padding=padding)
        tokenizer = read(path, pinned=False)
        assert (tokenizer.prefix, tokenizer.suffix) == (prefix, suffix)
        (tmp_path / "tokenizer.model").write_bytes(tokenizer.model)
        assert load(tmp_path / "tokenizer.model").prefix == prefix
        assert tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.model")).get_vocab_size() == tokenizer.size


def word_level(folder: Path) -> Path:
    """Write a tokenizer.json that splits at spaces alone, so that [MASK] in a text is one of its words."""
    made = tokenizers.Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2, "[MASK]": 3}, unk_token="[UNK]"))
    made.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    made.add_special_tokens(["<|startofpiece|>", "<|endofpiece|>", "<|endoftext|>"])
    made.save(str(folder / "tokenizer.json"))
    return folder / "tokenizer.json"


def write(name: str, content: str | bytes) -> Callable[[Path], Path]:
    def make(folder: Path) -> Path:
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        return folder / name

    return make


def beside(make: Callable[[Path], Path], name: str, content: str | None) -> Callable[[Path], Path]:
    """Return a maker that also writes, or removes, a file beside what `make` makes."""

    def both(folder: Path) -> Path:
        path = make(folder)
        if content is None:
            (folder / name).unlink()
        else:
            (folder / name).write_text(content, "utf-8")
        return path

    return both


def mistral(folder: Path) -> Path:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter([vocabularies.ENGLISH] * 20), model_writer=model, model_type="bpe", vocab_size=320,
        hard_vocab_limit=False, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    return write("tokenizer.model.v1", model.getvalue())(folder)


def large(folder: Path) -> Path:
    with open(folder / "tokenizer.json", "wb") as file:
        file.truncate(LARGEST + 1)
    return folder / "tokenizer.json"


TOKENIZER_JSON = vocabularies.library_file
REFUSED: dict[str, tuple[Callable[[Path], Path], str]] = {
    "no [MASK]": (lambda folder: TOKENIZER_JSON(folder, "[MASK]"), r"no token \[MASK\] or <mask> \(mask\)"),
    "no sop": (lambda folder: TOKENIZER_JSON(folder, "<sop>"), r"no token <\|startofpiece\|> or <sop> \(sop\)"),
    "no end": (lambda folder: TOKENIZER_JSON(folder, "<|endoftext|>", "[PAD]"), r"\(eos\)"),
    "[MASK] is a word": (word_level, r"reads \[MASK\] in a text as a special token"),
    "broken": (write("tokenizer.json", '{"model": {"type": "BPE"'), "is not valid JSON"),
    "a far id": (write("tokenizer.json", json.dumps({"model": {"type": "BPE", "vocab": {"a": 1 << 31}, "merges": []}})),
                 "a token with the id 2,147,483,648"),
    "deep": (write("tokenizer.json", '{"model":' * 200_000), "is nested too deeply"),
    "of no type": (write("tokenizer.json", '{"model": {"type": "Magic", "vocab": {}}}'), "not a tokenizer of the"),
    "tekken": (write("tekken.json", '{"config": {}, "vocab": [{"rank": 0}]}'), "no tokenizer.json .it has no `model`"),
    "a list": (write("vocab.json", '["[PAD]", "a"]'), "no tokenizer.json .it has no `model`"),
    "no merges": (beside(vocabularies.gpt2, "gpt2-merges.txt", None), "put its merges beside it, as gpt2-merges.txt"),
    "merges of another": (beside(vocabularies.gpt2, "gpt2-merges.txt", "#version: 0.2\nq z\n"),
                          "gpt2-merges.txt, line 2: 'qz' is not in gpt2-vocab.json"),
    "half a merge": (beside(vocabularies.gpt2, "gpt2-merges.txt", "a\n"), "merges.txt, line 1: a merge is two pieces"),
    "ids with a gap": (beside(write("vocab.json", '{"a": 0, "b": 7}'), "merges.txt", ""), "its ids are not 0 to 1"),
    "the merges": (write("merges.txt", "#version: 0.2\na b\n"), "holds the merges of a vocabulary"),
    "no [CLS]": (write("vocab.txt", "[PAD]\n[UNK]\n[MASK]\na\n"), r"no line is \[CLS\]"),
    "cog-pretrain.vocab": (write("cog-pretrain.vocab", "<unk>\t0\n<n>\t0\n"), "give the .model itself"),
    "mistral": (mistral, "nor ice_text.model .it has 3.. pieces.*nor cog-pretrain.model .it has 3.. pieces"),
    "an id of the vocabulary": (beside(vocabularies.word_piece, "added_tokens.json", '{"<|startofpiece|>": 5}'),
                                "the id of the added token <|startofpiece|> is 5, not one after"),
    "an id twice": (beside(vocabularies.word_piece, "added_tokens.json", '{"<sop>": 300, "<eop>": 300}'),
                    "is 300, that of <sop>, too"),
    "an id far away": (beside(vocabularies.word_piece, "added_tokens.json", '{"<sop>": 1000000}'), "1,000,000, not"),
    "an id that is text": (beside(vocabularies.word_piece, "added_tokens.json", '{"<sop>": "9"}'), "<sop> is '9', not"),
    "added tokens without sop": (beside(vocabularies.word_piece, "added_tokens.json", '{"[gMASK]": 300}'), r"\(sop\)"),
    "a name without an id": (beside(vocabularies.word_piece, "special_tokens_map.json", '{"mask_token": "<m>"}'),
                             "has no token <m>, which the files beside it name as mask_token"),
    "a list beside": (beside(vocabularies.word_piece, "added_tokens.json", "[]"), "does not hold a JSON object"),
    "tokens of no form": (beside(vocabularies.gpt2, "tokenizer_config.json", '{"added_tokens_decoder": {"x": 1}}'),
                          "added_tokens_decoder does not map ids to tokens"),
    "too large": (large, "has over 64 MB"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_tokenizer_of_a_glm_is_refused_in_one_line(case: str, tmp_path: Path):
    make, reason = REFUSED[case]
    path = make(tmp_path)
    with pytest.raises(UserError, match=reason) as refused:
        read(path, pinned=False)
    assert "\n" not in str(refused.value) and str(tmp_path) in str(refused.value)


@forms
def test_pinned_is_for_ice_text_alone(form: str, tmp_path: Path):
    path = FORMS[form](tmp_path)
    with pytest.raises(UserError, match=r"pinned is for ice_text\.model"):
        read(path, pinned=True)


def test_a_workdir_takes_only_what_was_written_for_it(tmp_path: Path):
    """The tokenizer.json of others lacks which token is which; it has to be read first."""
    with pytest.raises(UserError, match="nor a tokenizer.json that glm-jax wrote"):
        load(vocabularies.library_file(tmp_path))
    with pytest.raises(UserError, match="is no tokenizer of ours"):
        load(chinese_file(tmp_path))
    path = tmp_path / "tokenizer.model"
    whole = json.loads(read(tmp_path / "tokenizer.json", pinned=False).model)
    for damage in ({"added_tokens": whole["added_tokens"][1:]}, {"model": None}, {"post_processor": []}):
        path.write_text(json.dumps(whole | damage), "utf-8")
        for act in (load, lambda path: read(path, pinned=False)):
            with pytest.raises(UserError, match=r"tokenizer\.model"):
                act(path)


def test_without_the_library_one_line_says_how_to_get_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = vocabularies.word_piece(tmp_path)
    original = builtins.__import__

    def fail(name: str, *rest: object) -> object:
        if name == "tokenizers":
            raise ImportError(name)
        return original(name, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(builtins, "__import__", fail)
    with pytest.raises(UserError, match=r"pip install -e '\.\[huggingface\]'"):
        read(path, pinned=False)
    assert isinstance(read(chinese_file(tmp_path), pinned=False), ChineseTokenizer)


def test_the_form_of_the_model_is_our_own(tmp_path: Path):
    """Another order of keys or other spaces in the file, and another version of the library, give the same bytes."""
    path = vocabularies.gpt2(tmp_path)
    first = read(path, pinned=False)
    assert isinstance(first, LibraryTokenizer)
    content = json.loads(path.read_text("utf-8"))
    path.write_text("\ufeff" + json.dumps(dict(reversed(content.items())), indent=1), "utf-8")
    assert read(path, pinned=False).digest == first.digest
    assert library.is_finished(json.loads(first.model))
