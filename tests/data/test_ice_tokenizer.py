"""GLM-130B's ids, on a small made-up model of ice_text.model's form and on one of its size."""

from __future__ import annotations

import io
import pickle
import re
from pathlib import Path

import numpy as np
import pytest
import sentencepiece

from glm_jax.config.data import TokenizerConfig
from glm_jax.data.tokenizers import ice as ice_tokenizer
from glm_jax.data.tokenizers import sentencepiece as tokenizer
from glm_jax.data.tokenizers.ice import IceTokenizer, extend
from glm_jax.data.tokenizers.load import load, read
from glm_jax.data.tokenizers.pieces import NORMAL, append
from glm_jax.errors import UserError

TEXTS = ["hello world, this is a small model.", "天下大势，分久必合，合久必分。", "Hello! What? 12:34; a b c d e f g"]


@pytest.fixture(scope="module")
def small() -> bytes:
    """Train a model of the official form: unk, s, eos, pad, newline, then pieces; it normalises and adds a space."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20), model_writer=model, model_type="unigram", vocab_size=120,
        hard_vocab_limit=False, unk_id=0, bos_id=1, eos_id=2, pad_id=3, user_defined_symbols=["<n>"], minloglevel=2,
    )  # fmt: skip
    return model.getvalue()


@pytest.fixture(scope="module")
def later(small: bytes) -> IceTokenizer:
    return IceTokenizer(extend(small, pinned=False))


@pytest.fixture(scope="module")
def pinned(small: bytes) -> IceTokenizer:
    return IceTokenizer(extend(small, pinned=True))


@pytest.mark.slow
def test_the_official_numbers(small: bytes):
    """With 130,000 pieces, the special tokens have the ids of the released model."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small).get_piece_size()
    filled = append(small, [(f"filling{number}", NORMAL) for number in range(pieces, 130_000)])
    official = IceTokenizer(extend(filled, pinned=False))
    assert (official.unk, official.eos, official.pad) == (20_000, 20_002, 0)
    specials = [official.mask, official.gmask, official.smask, official.eod, official.sop, official.eop, official.enc,
                official.dblock]  # fmt: skip
    assert specials == list(range(150_000, 150_008))
    assert official.encode("\t")[-1] == 150_008
    assert official.encode("  ")[-1] == 150_009 and official.encode(" " * 80)[-1] == 150_087
    assert official.encode("😀")[-4:].tolist() == [150_088 + byte for byte in "😀".encode()]
    assert official.encode("\n")[-1] == 20_004
    assert official.size == 150_344
    assert IceTokenizer(extend(filled, pinned=True)).size == 150_088


def test_text_and_its_blanks_come_back(later: IceTokenizer):
    for text in (
        "hello\n\n  world\tthis",
        "天下\n大势",
        "a" + " " * 100 + "b",
        "  a",
        "\n",
        "small 😀 model",
        "",
        "a  ",
    ):
        ids = later.encode(text)  # [S]
        assert ids.dtype == np.int32 and (ids >= 20_000).all() and (ids < later.size).all()
        assert later.decode(ids) == text
    assert later.encode("a" + " " * 100 + "b").tolist()[-3:-1] == [later.encode(" " * n)[-1] for n in (80, 20)]
    assert later.decode(later.encode("ａ，b")) == "a,b"  # the model normalises
    assert later.decode(later.encode(" a")) == "a"  # and adds its own space before a text


def test_the_pinned_tokenizer_loses_newlines_and_blanks(pinned: IceTokenizer, later: IceTokenizer):
    assert pinned.decode(pinned.encode("hello\n\n  world\tthis")) == "hello world this"
    assert pinned.encode("hello world").tolist() == later.encode("hello world").tolist()
    assert pinned.unk in pinned.encode("😀") and later.unk not in later.encode("😀")
    assert pinned.digest != later.digest


@pytest.mark.parametrize("kind", ["later", "pinned"])
def test_special_tokens(kind: str, request: pytest.FixtureRequest):
    ice: IceTokenizer = request.getfixturevalue(kind)
    text = "hello[MASK] world[gMASK]"
    expected = [*ice.encode("hello"), ice.mask, *ice.encode(" world"), ice.gmask]
    assert ice.mask not in ice.encode(text)
    assert ice.decode([*expected, ice.sop, *ice.encode("a"), ice.eop, ice.eos, ice.dblock, 0, 19_999]) == "helloworlda"
    named = ice.decode([*expected, ice.sop, *ice.encode("a"), ice.eop, ice.eos], specials=True)
    assert named == "hello[MASK]world[gMASK]sopaeopeos"


def test_token_bytes(later: IceTokenizer):
    text = "hello\n  world\t😀"
    ids = later.encode(text)
    assert later.token_bytes.shape == (later.size,) and later.token_bytes.dtype == np.int32
    assert later.token_bytes[ids].sum() == len(f" {text}".encode())  # with the space added before it
    assert not later.token_bytes[:20_001].any()
    assert not later.token_bytes[[later.mask, later.sop, later.eop, later.eos, later.dblock]].any()


@pytest.fixture
def few_pieces(small: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    """Take the small model for the official one."""
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small).get_piece_size()
    monkeypatch.setattr(ice_tokenizer, "PIECES", pieces)


@pytest.mark.usefixtures("few_pieces")
def test_load_and_pickle(tmp_path: Path, later: IceTokenizer, pinned: IceTokenizer):
    path = tmp_path / "tokenizer.model"
    for ice in (later, pinned):
        path.write_bytes(ice.model)
        for copy in (load(path), pickle.loads(pickle.dumps(ice))):
            assert isinstance(copy, IceTokenizer) and copy.digest == ice.digest
            assert copy.encode("a\nb  c").tolist() == ice.encode("a\nb  c").tolist()


@pytest.mark.usefixtures("few_pieces")
def test_read(tmp_path: Path, small: bytes, later: IceTokenizer, pinned: IceTokenizer):
    path = tmp_path / "ice_text.model"
    path.write_bytes(small)
    assert read(path, pinned=False).model == later.model and read(path, pinned=True).model == pinned.model
    assert isinstance(read(path, pinned=True), IceTokenizer)
    for ice, kind in ((later, False), (pinned, True)):
        path.write_bytes(ice.model)
        assert read(path, pinned=kind).model == ice.model
        with pytest.raises(UserError, match=f"was read with pinned={kind}: set data.tokenizer.pinned={kind}"):
            read(path, pinned=not kind)
    ours = tokenizer.train(TEXTS, 330)
    path.write_bytes(ours)
    assert read(path, pinned=False).model == ours
    with pytest.raises(UserError, match=r"pinned is for ice_text\.model"):
        read(path, pinned=True)
    with pytest.raises(UserError, match="cannot read the tokenizer"):
        read(tmp_path / "missing", pinned=False)


@pytest.mark.usefixtures("few_pieces")
@pytest.mark.parametrize(
    ("before", "after", "reason"),
    [
        (b"<n>", b"<m>", "its piece 4 is not <n>"),
        (b"</s>", b"</S>", "its piece 2 is not </s>"),
    ],
)
def test_the_official_model_is_known_by_its_first_pieces(
    tmp_path: Path, small: bytes, before: bytes, after: bytes, reason: str
):
    path = tmp_path / "ice_text.model"
    path.write_bytes(small.replace(before, after))
    with pytest.raises(UserError, match=f"its piece 0 is not pad.*nor ice_text.model .{reason}"):
        read(path, pinned=False)


def test_the_official_model_is_known_by_the_number_of_its_pieces(tmp_path: Path, small: bytes, later: IceTokenizer):
    """GLM's own Chinese model has <n> and </s>, too; read as ice_text.model, every id would be off by 20,000."""
    path = tmp_path / "cog-pretrain.model"
    pieces = sentencepiece.SentencePieceProcessor(model_proto=small).get_piece_size()
    for model, count, wanted in ((small, pieces, "130,000"), (later.model, pieces + 344, "130,344")):
        path.write_bytes(model)
        for act in (load, lambda path: read(path, pinned=False)):
            with pytest.raises(UserError, match=f"nor ice_text.model .it has {count} pieces, not {wanted}"):
                act(path)


@pytest.mark.usefixtures("few_pieces")
def test_the_special_pieces_are_all_there_in_their_order(tmp_path: Path, later: IceTokenizer, pinned: IceTokenizer):
    path = tmp_path / "tokenizer.model"
    for model, before, after, name in (
        (later.model, b"<sop>", b"<sup>", "<sop>"),
        (later.model, b"<|blank_7|>", b"<|blank_x|>", "<|blank_7|>"),
        (pinned.model, b"<|blank_80|>", b"<|blank_8x|>", "<|blank_80|>"),
    ):
        path.write_bytes(model.replace(before, after))
        with pytest.raises(UserError, match=re.escape(f"is not {name}")):
            load(path)


def test_pinned_means_nothing_without_a_file():
    with pytest.raises(ValueError, match=r"pinned is a reading of ice_text\.model"):
        TokenizerConfig(pinned=True)
    assert TokenizerConfig(pinned=True, path="ice_text.model").pinned
