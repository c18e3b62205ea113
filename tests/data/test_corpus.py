"""Readers, duplicates, the split by hash, shards."""

from __future__ import annotations

import gzip
import json
import pickle
import random
import sys
from pathlib import Path

import grain
import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given
from hypothesis import strategies as st

from glm_jax.data import corpus
from glm_jax.data.corpus import Shards, find_files, read, split, write_documents, write_shards
from glm_jax.data.deduplicate import deduplicate, shingles
from glm_jax.data.tokenizer import Tokenizer, train
from glm_jax.errors import UserError

WORDS = [
    "return",
    "array",
    "shape",
    "type",
    "value",
    "index",
    "axis",
    "scalar",
    "matrix",
    "vector",
    "norm",
    "mean",
    "sum",
    "product",
    "input",
    "output",
]
CHARACTERS = "天下大势分久必合周末七国争并入于秦及灭之后楚汉又自高祖斩白蛇而起义一统"


def english(seed: int, words: int = 40) -> str:
    draw = random.Random(seed)
    return " ".join(draw.choice(WORDS) for _ in range(words)) + "."


def chinese(seed: int, characters: int = 120) -> str:
    draw = random.Random(seed)
    return "".join(draw.choice(CHARACTERS) for _ in range(characters)) + "。"


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer(train([english(seed) for seed in range(50)] + [chinese(seed) for seed in range(50)], 400))


# Reading


def test_text_documents_end_at_blank_lines(tmp_path: Path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbf\n  one\r\n\ttwo\n \t\n\n\xe5\xa4\xa9\nlast\xe2\x80\xa8line")
    assert list(read([path, path], "text")) == ["  one\n\ttwo", "天\nlast\u2028line"] * 2


def test_jsonl_and_its_compressed_form(tmp_path: Path):
    texts = ["one\n\nstill one", "天下\r\u2028\0", "[MASK]"]
    lines = "".join(json.dumps({"body": text, "n": 1}) + "\n\n" for text in [*texts, " \n"]).encode()
    plain, packed = tmp_path / "a.jsonl", tmp_path / "a.jsonl.zst"
    plain.write_bytes(lines)
    half = len(lines) // 2
    packed.write_bytes(zstandard.compress(lines[:half]) + zstandard.compress(lines[half:]))  # two frames
    assert list(read([plain], "jsonl", "body")) == texts
    assert list(read([packed], "jsonl.zst", "body")) == texts


def test_parquet(tmp_path: Path):
    path = tmp_path / "a.parquet"
    pyarrow.parquet.write_table(pyarrow.table({"body": ["one", "天下", ""], "n": [1, 2, 3]}), path)
    assert list(read([path], "parquet", "body")) == ["one", "天下"]
    with pytest.raises(UserError, match="no column 'text': set the source's `field` to one of body, n"):
        list(read([path], "parquet", "text"))
    with pytest.raises(UserError, match="row 1: no text in column 'n'"):
        list(read([path], "parquet", "n"))


def test_find_files(tmp_path: Path):
    for name in ("b.txt", "a.txt", "deep/c.txt", ".hidden", ".git/d.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    assert find_files(str(tmp_path)) == [tmp_path / name for name in ("a.txt", "b.txt", "deep/c.txt")]
    assert find_files(str(tmp_path / "*.txt")) == [tmp_path / "a.txt", tmp_path / "b.txt"]
    assert find_files(str(tmp_path / "**" / "c.txt")) == [tmp_path / "deep" / "c.txt"]
    assert find_files(str(tmp_path / "a.txt")) == [tmp_path / "a.txt"]
    for missing in ("missing", "*.json"):
        with pytest.raises(UserError, match="is not there: give a file, a directory or a glob"):
            find_files(str(tmp_path / missing))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="empty is a directory without files"):
        find_files(str(tmp_path / "empty"))


@pytest.mark.parametrize(
    ("form", "content", "message"),
    [
        ("text", b"good\n\nbad \xff\n", r"file, line 3: invalid UTF-8 \(byte 0xff at 4\): convert"),
        ("jsonl", b'{"text": "good"}\n\n{"text": \n', r"file, line 3: broken JSON \(Expecting value\)"),
        ("jsonl", b"[" * 100_000, r"file, line 1: broken JSON"),
        ("jsonl", b'{"text": "good"}\n{"body": "b"}\n', r"file, line 2: no text in field 'text'"),
        ("jsonl", b'{"text": 1}\n', r"file, line 1: no text in field 'text'"),
        ("jsonl", b'["text"]\n', r"file, line 1: no text in field 'text'"),
        ("jsonl", b'{"text": "\\ud800"}\n', r"file, line 1: half a surrogate pair in 'text'"),
        ("jsonl.zst", gzip.compress(b'{"text": "a"}\n'), r"file is not a whole zstd file"),
        ("parquet", b"text,n\na,1\n", r"file is not a parquet file"),
    ],
)
def test_a_damaged_file_is_one_line(tmp_path: Path, form: str, content: bytes, message: str):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        list(read([path], form))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(("form", "module"), [("jsonl.zst", "zstandard"), ("parquet", "pyarrow")])
def test_a_missing_package_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str, module: str):
    for name in [name for name in sys.modules if name.split(".")[0] == module] or [module]:
        monkeypatch.setitem(sys.modules, name, None)
    path = tmp_path / "file"
    path.touch()
    with pytest.raises(UserError, match=f"reading {form} needs the package {module}: pip install {module}"):
        list(read([path], form))


# Duplicates


def test_exact_duplicates_differ_in_whitespace_at_most():
    first, second = english(1), english(2)
    kept, dropped = deduplicate([first, second, first, first.replace(" ", "\n  "), second + "\n"], 0)
    assert (dropped.exact, dropped.near) == (3, 0)
    assert {" ".join(document.text.split()) for document in kept} == {first, second}


@pytest.mark.parametrize("make", [english, chinese])
def test_near_duplicates(make):
    texts = [make(seed, 300) for seed in range(20)]
    changed = [text[:-9] + "Changed." for text in texts[:5]]
    far = [text[: len(text) // 3] + make(seed + 100, 300) for seed, text in enumerate(texts[5:10])]
    kept, dropped = deduplicate([*texts, *changed, *far], 0.8)
    assert (dropped.exact, dropped.near) == (0, 5)
    assert {document.text for document in kept} >= {*texts[5:], *far}
    assert deduplicate([*texts, *changed, *far], 0)[1].near == 0


def test_the_kept_do_not_depend_on_the_order():
    texts = [english(seed, 100) for seed in range(30)]
    texts += [text[:-30] + english(seed + 50, 3) for seed, text in enumerate(texts)] + texts[:4]
    kept, dropped = deduplicate(texts, 0.7)
    assert dropped.near > 10 and dropped.exact == 4
    for seed in range(3):
        random.Random(seed).shuffle(texts)
        assert deduplicate(iter(texts), 0.7) == (kept, dropped)
    assert [document.digest for document in kept] == sorted(document.digest for document in kept)


def test_shingles():
    assert shingles("One two, three FOUR") == shingles("one TWO three\nfour!")
    assert len(shingles("one two three four")) == 2
    assert len(shingles("天下大势，分久")) == 4
    assert len(shingles("numpy天下")) == 1  # three units: a word and two characters
    assert shingles("天下势") != shingles("天势下")
    assert shingles("😀 😀") != shingles("--- ---")  # no words: the text itself
    assert len(shingles("")) == 1


# Split


@given(texts=st.sets(st.text(min_size=1), max_size=40).filter(bool), heldout=st.floats(0, 0.99))
def test_split_is_a_partition_that_others_do_not_move(texts: set[str], heldout: float):
    documents, _ = deduplicate(texts, 0)
    sides = split(documents, heldout)
    assert sorted([*sides["train"], *sides["heldout"]], key=lambda kept: kept.digest) == documents
    assert sides["train"]
    assert bool(sides["heldout"]) or heldout == 0 or len(documents) < corpus.ALWAYS_HELD_OUT
    if len(documents) == 1 or heldout == 0:
        assert not sides["heldout"]


def test_split_share_and_stability():
    documents, _ = deduplicate((english(seed, 6) for seed in range(4000)), 0)
    heldout = split(documents, 0.05)["heldout"]
    assert abs(len(heldout) / len(documents) - 0.05) < 0.015
    half = documents[::2]
    assert split(half, 0.05)["heldout"] == [document for document in half if document in set(heldout)]


# Shards


@pytest.fixture
def stages(tmp_path: Path, tokenizer: Tokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(corpus, "SHARD_BYTES", 4000)
    documents, shards = tmp_path / "documents", tmp_path / "shards"
    documents.mkdir()
    shards.mkdir()
    texts = [english(seed) for seed in range(60)] + [chinese(seed) + "\n[MASK]\u2581\0" for seed in range(40)]
    write_documents(documents, [*texts, texts[0]], 0.2, 0.8, "here")
    write_shards(shards, documents, tokenizer, "mixed")
    return documents, shards


def test_shards_hold_every_document_in_hash_order(stages: tuple[Path, Path], tokenizer: Tokenizer):
    documents, directory = stages
    index = json.loads((directory / "index.json").read_text("utf-8"))
    assert index["dropped"] == {"exact": 1, "near": 0}
    assert (index["source"], index["tokenizer"], index["dtype"]) == ("mixed", tokenizer.digest, "<u2")
    for name in corpus.SPLITS:
        shards = Shards.open(directory, name)
        texts = list(read([documents / f"{name}.jsonl"], "jsonl"))
        assert index["documents"][name] == len(shards) == len(texts)
        assert index["bytes"][name] == sum(len(text.encode()) for text in texts)
        assert index["tokens"][name] == shards.lengths.sum()
        assert shards.lengths.dtype == np.int64
        for position, text in enumerate(texts):
            ids = shards[position]  # [S]
            assert ids.dtype == np.int32 and len(ids) == shards.lengths[position]
            assert ids[-1] == tokenizer.eos and tokenizer.decode(ids[:-1]) == text
    assert sum(index["documents"].values()) == 100
    names = sorted(path.name for path in directory.glob("train-*.array_record"))
    # one document a group, so that a read fetches no neighbours
    reader = ArrayRecordReader(str(directory / names[0]))
    assert reader.writer_options_string().startswith("group_size:1,")
    assert names[0] == f"train-00000-of-{len(names):05d}.array_record" and len(names) > 2


def test_shards_are_lazy_sources_for_grain(stages: tuple[Path, Path]):
    shards = Shards.open(stages[1], "train")
    copy = pickle.loads(pickle.dumps(shards))
    assert copy[3].tolist() == shards[3].tolist()
    dataset = grain.MapDataset.source(shards)
    assert len(dataset) == len(shards)
    np.testing.assert_array_equal(np.asarray(dataset[len(shards) - 1]), shards[len(shards) - 1])
    for outside in (-1, len(shards)):
        with pytest.raises(IndexError, match=f"document {outside} of {len(shards)}"):
            shards[outside]


def test_a_split_may_be_empty(tmp_path: Path, tokenizer: Tokenizer):
    for name in ("documents", "shards"):
        (tmp_path / name).mkdir()
    write_documents(tmp_path / "documents", ["only one"], 0.5, 0.8, "here")
    write_shards(tmp_path / "shards", tmp_path / "documents", tokenizer, "one")
    heldout = Shards.open(tmp_path / "shards", "heldout")
    assert len(heldout) == 0 and heldout.lengths.shape == (0,)
    with pytest.raises(IndexError):
        heldout[0]
    assert tokenizer.decode(Shards.open(tmp_path / "shards", "train")[0]) == "only one"


def test_an_empty_corpus(tmp_path: Path):
    with pytest.raises(UserError, match="corpus here is empty"):
        write_documents(tmp_path, iter([]), 0.5, 0.8, "here")
