"""The tokenizer: no text is lost, specials never come from text, training is deterministic and quiet."""

from __future__ import annotations

import hashlib
import pickle
import re

import numpy as np
import pytest
import sentencepiece
from hypothesis import example, given, settings
from hypothesis import strategies as st
from texts import ENGLISH as TEXTS

from glm_jax.data.tokenizers import sentencepiece as tokenizer_module
from glm_jax.data.tokenizers.load import load
from glm_jax.data.tokenizers.load import read as read_tokenizer
from glm_jax.data.tokenizers.sentencepiece import SPECIALS, SentencePieceTokenizer, train
from glm_jax.errors import UserError
from glm_jax.workdir import folder

ENGLISH = """Return a new array of given shape and type, filled with zeros.

    Parameters
    ----------
    shape : int or tuple of ints
        Shape of the new array, e.g., ``(2, 3)`` or ``2``.

    >>> zeros((2, 1))
    array([[ 0.],
           [ 0.]])
"""
CHINESE = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。\n"
DOCUMENTS = [*TEXTS, CHINESE, CHINESE.replace("天下", "江山"), CHINESE[5:], CHINESE[16:].replace("，", "。")]


@pytest.fixture(scope="module")
def model() -> bytes:
    return train(DOCUMENTS, 800)


@pytest.fixture(scope="module")
def tokenizer(model: bytes) -> SentencePieceTokenizer:
    return SentencePieceTokenizer(model)


@settings(max_examples=300, deadline=None)
@given(text=st.text() | st.text(alphabet=" \t\n\r\0\u2581\u2585\ufffd\ufeff[MASK]<0x4>aZ分合😀"))
@example("\u2581a \u2581\u2581b\u2581")
@example("\0\t\x1b\x7f")
@example("[MASK] [gMASK] [sMASK] sop eop eos pad unk <0x41> <unk> <s>")
@example("a\rb\r\nc\n\n\n    d\t\te")
@example("  leading and trailing   ")
@example("👩\u200d🔬 \u0301e e\u0301 ﬁ Ａ \u2028\u00a0\u3000\U0010ffff\ufffe")
def test_decode_inverts_encode(tokenizer: SentencePieceTokenizer, text: str):
    ids = tokenizer.encode(text)  # [S]
    assert ids.dtype == np.int32 and ids.ndim == 1
    assert tokenizer.decode(ids) == text
    assert int(tokenizer.token_bytes[ids].sum()) == len(text.encode())
    assert not np.isin(ids, range(len(SPECIALS))).any()


def test_special_ids(tokenizer: SentencePieceTokenizer):
    ids = [tokenizer.pad, tokenizer.unk, tokenizer.eos, tokenizer.mask, tokenizer.gmask, tokenizer.smask,
           tokenizer.sop, tokenizer.eop]  # fmt: skip
    assert ids == list(range(8))
    assert tokenizer.decode(ids) == ""
    assert tokenizer.decode(ids, specials=True) == "padunkeos[MASK][gMASK][sMASK]sopeop"
    assert (tokenizer.token_bytes == 0).nonzero()[0].tolist() == ids
    assert tokenizer.token_bytes.shape == (tokenizer.size,)


def test_special_tokens_print_their_names_only_when_asked_for(tokenizer: SentencePieceTokenizer):
    text = "天下[MASK]，[gMASK] a[sMASK][MASK]"
    expected = [*tokenizer.encode("天下"), tokenizer.mask, *tokenizer.encode("，"), tokenizer.gmask,
                *tokenizer.encode(" a"), tokenizer.smask, tokenizer.mask]  # fmt: skip
    assert tokenizer.decode(expected, specials=True) == text
    assert tokenizer.decode(expected) == "天下， a"


def test_text_compresses_in_both_languages(tokenizer: SentencePieceTokenizer):
    assert len(tokenizer.encode(TEXTS[5])) < len(TEXTS[5]) / 2.5
    assert len(tokenizer.encode(CHINESE)) < len(CHINESE)
    assert len(tokenizer.encode("      ")) == 1  # an indentation is one piece
    assert len(tokenizer.encode(".\n\n")) == 1


def test_a_cut_character_is_replaced(tokenizer: SentencePieceTokenizer):
    ids = tokenizer.encode("😀")  # not in the training text: four byte pieces
    assert len(ids) == 4
    assert tokenizer.decode(ids[:3]) == "\ufffd"


def test_training_is_deterministic_and_quiet(model: bytes, capfd: pytest.CaptureFixture[str]):
    assert train(DOCUMENTS, 800) == model
    assert capfd.readouterr() == ("", "")
    assert SentencePieceTokenizer(model).digest == hashlib.sha256(model).hexdigest()


def test_long_lines_and_awkward_characters_are_trained_on():
    endings = ["", "ly", "ness", "est"]
    line = "".join(f" wonderful{ending}" for ending in endings) * 1000
    line += "\0\t\u2585\u2581" + "".join(f" marvellous{ending}" for ending in endings) * 1000
    tokenizer = SentencePieceTokenizer(train([line], 310))
    assert len(tokenizer.encode(" wonderful")) == 1
    assert len(tokenizer.encode(" marvellous")) == 1


def test_many_characters_leave_room_for_words():
    characters = "".join(chr(0x4E00 + index) for index in range(3000))
    tokenizer = SentencePieceTokenizer(train([characters, *["天下大势，", "天下大势。"] * 500], 600))
    assert tokenizer.size <= 600
    assert len(tokenizer.encode("天下大势")) == 1
    assert tokenizer.decode(tokenizer.encode(characters)) == characters


def test_training_reads_no_more_than_it_uses(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(tokenizer_module, "TRAINING_BYTES", 3000)
    documents = iter([ENGLISH] * 100)
    train(documents, 400)
    assert len(list(documents)) > 80


def test_bad_input_is_one_line(tmp_path, tokenizer: SentencePieceTokenizer):
    with pytest.raises(UserError, match="vocab_size is 264, it must be at least 266"):
        train([ENGLISH], 264)
    for documents in ([], [" \n"]):
        with pytest.raises(UserError, match="no text"):
            train(documents, 500)
    with pytest.raises(UserError, match="cannot read the tokenizer .*missing.model"):
        load(tmp_path / "missing.model")
    model = tokenizer.model
    for damaged in (
        b"not a model",
        b"\x12\x00",
        model[:-9],
        model[: len(model) // 2],
        model.replace(b"sop", b"s\xffp"),
    ):
        (tmp_path / "bad.model").write_bytes(damaged)
        with pytest.raises(UserError, match="bad.model is not a SentencePiece model"):
            load(tmp_path / "bad.model")
    (tmp_path / "bad.model").write_bytes(b"")
    with pytest.raises(UserError, match="bad.model is empty"):
        load(tmp_path / "bad.model")


OTHERS = {  # how to train a model that is not ours, and what it lacks
    "names": ({"unk_piece": "what"}, "its piece 1 is not unk"),
    "order": ({"control_symbols": ["[MASK]", "[sMASK]", "[gMASK]", "sop", "eop"]}, "its piece 4 is not [gMASK]"),
    "two specials": (
        {"control_symbols": ["[MASK]", "sop"], "pad_id": -1, "unk_id": 0, "eos_id": 1},
        "its piece 0 is not pad",
    ),
    "no masks": ({"control_symbols": []}, "its piece 3 is not [MASK]"),
    "in text": (
        {"control_symbols": [], "user_defined_symbols": ["[MASK]", "[gMASK]", "[sMASK]", "sop", "eop"]},
        "[MASK] is an ordinary piece",
    ),
    "bytes": ({"byte_fallback": False}, "it has no piece for the byte 0x00"),
    "normalisation": ({"normalization_rule_name": "nmt_nfkc"}, "it normalises text"),
    "case": ({"normalization_rule_name": "nfkc_cf"}, "it normalises text"),
    "spaces": ({"remove_extra_whitespaces": True}, "it normalises text"),
    "prefix": ({"add_dummy_prefix": True}, "it normalises text"),
}


@pytest.mark.parametrize("kind", OTHERS)
def test_a_model_is_ours_only_by_all_that_makes_it(kind: str, tmp_path, monkeypatch: pytest.MonkeyPatch):
    changes, reason = OTHERS[kind]
    usual = sentencepiece.SentencePieceTrainer.train
    monkeypatch.setattr(
        sentencepiece.SentencePieceTrainer, "train", lambda **options: usual(**(options | changes))
    )  # fmt: skip
    path = tmp_path / "other.model"
    path.write_bytes(train(DOCUMENTS, 500))
    for read in (load, lambda path: read_tokenizer(path, pinned=False)):
        with pytest.raises(UserError, match=re.escape(f"other.model is no tokenizer of ours ({reason}")):
            read(path)


def test_the_identity_of_a_tokenizer_is_its_content(
    tmp_path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch
):
    """The same file under another path, or another spelling of its path, resumes; another file does not."""
    workdir = tmp_path / "run"
    workdir.mkdir()
    for path in (workdir / "tokenizer.model", tmp_path / "a.model", tmp_path / "b.model"):
        path.write_bytes(tokenizer.model)
    (tmp_path / "link.model").symlink_to(tmp_path / "a.model")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    for path in ("a.model", "run/../a.model", "~/a.model", tmp_path / "b.model", "link.model"):
        folder.check_tokenizer(workdir, read_tokenizer(path, pinned=False))
    (tmp_path / "b.model").write_bytes(train(DOCUMENTS, 500))
    with pytest.raises(UserError, match="is not the tokenizer of these sources"):
        folder.check_tokenizer(workdir, read_tokenizer("b.model", pinned=False))


def test_load_and_pickle(tmp_path, tokenizer: SentencePieceTokenizer):
    path = tmp_path / "tokenizer.model"
    path.write_bytes(tokenizer.model)
    for copy in (load(path), pickle.loads(pickle.dumps(tokenizer))):
        assert copy.digest == tokenizer.digest
        assert copy.encode(ENGLISH).tolist() == tokenizer.encode(ENGLISH).tolist()
