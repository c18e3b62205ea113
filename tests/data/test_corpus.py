"""Duplicates, the split by hash, damaged records, shards."""

from __future__ import annotations

import dataclasses
import json
import os
import pickle
import random
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import zstandard
from array_record.python.array_record_module import ArrayRecordReader
from hypothesis import given
from hypothesis import strategies as st
from texts import chinese, english

from glm_jax.data.corpora import corpus, readers, shards
from glm_jax.data.corpora.build import Workers
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.corpora.corpus import Input, read_documents, split, write_documents
from glm_jax.data.corpora.deduplicate import digest_of
from glm_jax.data.corpora.files import Found, find_files
from glm_jax.data.corpora.shards import Shards, write_shards
from glm_jax.data.tokenizers.sentencepiece import SentencePieceTokenizer, train
from glm_jax.errors import UserError


@pytest.fixture(scope="module")
def tokenizer() -> SentencePieceTokenizer:
    return SentencePieceTokenizer(
        train([english(seed) for seed in range(50)] + [chinese(seed) for seed in range(50)], 400)
    )


# Split


@pytest.mark.slow
@given(texts=st.sets(st.text(min_size=1), max_size=40).filter(bool), heldout=st.floats(0, 0.99))
def test_split_is_a_partition_that_others_do_not_move(texts: set[str], heldout: float):
    places = np.array([hash_place(text) for text in sorted(texts)], np.uint64)
    sides = split(places, heldout)
    assert sides.shape == places.shape and (sides == 0).any()
    assert sides.any() or heldout == 0 or len(texts) < corpus.ALWAYS_HELD_OUT
    if len(texts) == 1 or heldout == 0:
        assert not sides.any()


def hash_place(text: str) -> int:
    return int.from_bytes(digest_of(text + ".")[16:24], "big")


def test_split_share_and_stability():
    places = np.array([hash_place(english(seed, 6)) for seed in range(4000)], np.uint64)
    sides = split(places, 0.05)
    assert abs(sides.mean() - 0.05) < 0.015
    assert (split(places[::2], 0.05) == sides[::2]).all()


# Stages


def make_documents(
    directory: Path, files: list[Path], *, form: str = "jsonl", strict: bool = True, heldout: float = 0.2
) -> dict[str, Any]:
    directory.mkdir()
    with Workers(1) as workers:
        given = Input(Found(tuple(files)), form, where="here")
        write_documents(directory, given, heldout, 0.8, workers, strict=strict, report=print)
    return corpus.read_index(directory)


def write_jsonl(path: Path, texts: list[str]) -> Path:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")
    return path


TEXTS = [english(seed) for seed in range(60)] + [chinese(seed) + "\n[MASK]\u2581" for seed in range(40)]


@pytest.fixture
def stages(tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    monkeypatch.setattr(corpus, "PART_BYTES", 8000)
    documents, shards = tmp_path / "documents", tmp_path / "shards"
    shards.mkdir()
    near_twin = TEXTS[1] + " One more."
    files = [write_jsonl(tmp_path / "a", TEXTS[:50]), write_jsonl(tmp_path / "b", [*TEXTS[50:], TEXTS[0], near_twin])]
    make_documents(documents, files)
    with Workers(1) as workers:
        write_shards(shards, documents, tokenizer, "mixed", workers)
    return documents, shards


def test_shards_hold_every_document_in_hash_order(stages: tuple[Path, Path], tokenizer: SentencePieceTokenizer):
    documents, directory = stages
    index = json.loads((directory / "index.json").read_text("utf-8"))
    assert index["dropped"] == {"exact": 1, "near": 1} and index["skipped"] == {}
    assert (index["source"], index["tokenizer"], index["dtype"]) == ("mixed", tokenizer.digest, "<u2")
    for name in corpus.SPLITS:
        shards = Shards.open(directory, name)
        texts = list(read_documents(documents, name))
        assert [digest_of(text) for text in texts] == sorted(map(digest_of, texts))
        assert index["documents"][name] == len(shards) == len(texts)
        assert index["bytes"][name] == sum(len(text.encode()) for text in texts)
        assert index["tokens"][name] == shards.lengths.sum()
        assert shards.lengths.dtype == np.int64
        for position, text in enumerate(texts):
            ids = shards[position]  # [S]
            assert ids.dtype == np.int32 and len(ids) == shards.lengths[position]
            assert ids[-1] == tokenizer.eos and tokenizer.decode(ids[:-1]) == text
    assert sum(index["documents"].values()) == 100
    paths = sorted(directory.glob("part-*/train.array_record"))
    assert len(paths) > 2 and paths[0].parent.name == f"part-00000-of-{len(paths):05d}"
    # one document per group, so that a read fetches no neighbours
    assert ArrayRecordReader(str(paths[0])).writer_options_string().startswith("group_size:1,")
    left = {path.name for path in [*documents.rglob("*"), *directory.rglob("*")] if path.is_file()}
    assert left == {"index.json", "skipped.jsonl", "documents.jsonl", "sides.npy", "train.array_record",
                    "heldout.array_record", "train-lengths.npy", "heldout-lengths.npy"}  # fmt: skip


def test_the_number_of_parts_does_not_matter(stages: tuple[Path, Path], tmp_path: Path, monkeypatch):
    monkeypatch.setattr(corpus, "PART_BYTES", 1 << 30)
    index = make_documents(tmp_path / "whole", [tmp_path / "b", tmp_path / "a"])
    assert len(list((tmp_path / "whole").glob("part-*"))) == 1
    assert index == corpus.read_index(stages[0])
    for name in corpus.SPLITS:
        assert list(read_documents(tmp_path / "whole", name)) == list(read_documents(stages[0], name))


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


def test_a_split_may_be_empty(tmp_path: Path, tokenizer: SentencePieceTokenizer):
    make_documents(tmp_path / "documents", [write_jsonl(tmp_path / "a", ["only one"])], heldout=0.5)
    (tmp_path / "shards").mkdir()
    with Workers(1) as workers:
        write_shards(tmp_path / "shards", tmp_path / "documents", tokenizer, "one", workers)
    heldout = Shards.open(tmp_path / "shards", "heldout")
    assert len(heldout) == 0 and heldout.lengths.shape == (0,)
    with pytest.raises(IndexError):
        heldout[0]
    assert tokenizer.decode(Shards.open(tmp_path / "shards", "train")[0]) == "only one"


def test_a_full_disk_under_the_shards_is_named(tmp_path: Path, tokenizer: SentencePieceTokenizer, monkeypatch):
    make_documents(tmp_path / "documents", [write_jsonl(tmp_path / "a", ["only one"])])

    class Full:
        def __init__(self, *_: str) -> None: ...

        def write(self, _: bytes) -> None:
            raise RuntimeError("write() failed: No space left on device; writing /x; at byte 0")  # as ArrayRecord does

    monkeypatch.setattr(shards, "ArrayRecordWriter", Full)
    with pytest.raises(UserError, match=r"^no room for .*key \(No space left on device\)"), Workers(1) as workers:
        Cache(tmp_path, print).made(
            "shards", "key", lambda building: write_shards(building, tmp_path / "documents", tokenizer, "one", workers)
        )


def test_files_that_cannot_be_read_are_accounted_for(tmp_path: Path):
    file = write_jsonl(tmp_path / "a", ["only one"])
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    found = find_files(str(tmp_path))
    with Workers(1) as workers:
        for strict in (True, False):
            directory = tmp_path / f"documents-{strict}"
            directory.mkdir()
            arguments = (directory, Input(found, "jsonl", where="here"), 0.0, 0.0, workers)
            if strict:
                with pytest.raises(UserError, match="link: a link to .*/nowhere, which is not there"):
                    write_documents(*arguments, strict=strict, report=print)
            else:
                write_documents(*arguments, strict=strict, report=print)
    index = corpus.read_index(tmp_path / "documents-False")
    assert found.files == (file,) and index["documents"]["train"] == 1
    assert index["skipped"] == {"dangling link": {"count": 1, "places": [{"file": str(tmp_path / "link"), "line": 1}]}}


def test_an_empty_corpus(tmp_path: Path):
    with pytest.raises(UserError, match="corpus here is empty: it needs at least one line of text$"):
        make_documents(tmp_path / "documents", [write_jsonl(tmp_path / "a", [" "])])
    (tmp_path / "b").write_text("{\n{\n")
    with pytest.raises(
        UserError, match=r"; 2 damaged records were skipped, the first in .*/b, line 1: broken JSON \(Expecting prop"
    ):
        make_documents(tmp_path / "more", [tmp_path / "b"], strict=False)


# Damage


def damaged_corpus(folder: Path) -> tuple[list[Path], list[str], list[tuple[str, str, int]]]:
    """Write three files of records, one in a hundred damaged and the last file truncated, and an empty file.

    Return the files, the good texts, and (reason, file name, line) of the damaged records.
    """
    draw = random.Random(0)
    damage = [
        ("invalid UTF-8", b'{"text": "caf\xe9"}'),
        ("broken JSON", b'{"text": "no end'),
        ("NUL", b'{"text": "a\0b"}'),
        ("too long", b'{"text": "' + b"x" * 1_500_000 + b'"}'),
        ("missing field", b'{"body": "text"}'),
    ]
    files, good, bad = [], [], []
    for name in ("a.jsonl.zst", "b.jsonl.zst", "c.jsonl.zst"):
        lines = []
        for number in range(1, 601):
            if number % 100 == 50:
                reason, line = damage[len(bad) % len(damage)]
                bad.append((reason, name, number))
                lines.append(line)
            else:
                good.append(f"{name} {number} " + english(draw.randrange(1 << 30), 12))
                lines.append(json.dumps({"text": good[-1]}).encode())
        packed = zstandard.compress(b"\n".join(lines) + b"\n")
        if name == "c.jsonl.zst":
            packed += zstandard.compress(b'{"text": "lost"}\n')[:-4]
            bad.append(("truncated", name, 601))
        files.append(folder / name)
        files[-1].write_bytes(packed)
    files.append(folder / "d.jsonl.zst")
    files[-1].touch()
    return files, good, [*bad, ("empty file", "d.jsonl.zst", 1)]


def test_one_percent_damaged_records_are_counted_and_the_rest_arrives(tmp_path: Path, monkeypatch):
    monkeypatch.setattr(readers, "LONGEST_RECORD", 1_000_000)
    monkeypatch.setattr(corpus, "PLACES", 3)
    files, good, bad = damaged_corpus(tmp_path)
    index = make_documents(tmp_path / "documents", files, form="jsonl.zst", strict=False)
    arrived = [text for name in corpus.SPLITS for text in read_documents(tmp_path / "documents", name)]
    assert sorted(arrived) == sorted(good)
    lines = map(json.loads, (tmp_path / "documents" / "skipped.jsonl").read_text().splitlines())
    assert [(line["reason"], Path(line["file"]).name, line["line"]) for line in lines] == bad
    for reason, skipped in index["skipped"].items():
        mine = [{"file": str(tmp_path / name), "line": line} for why, name, line in bad if why == reason]
        assert skipped == {"count": len(mine), "places": mine[:3]}
    assert {reason for reason, *_ in bad} == set(index["skipped"])


@pytest.mark.slow
def test_strict_stops_at_the_first_even_after_a_build_that_did_not(tmp_path: Path):
    files, good, _ = damaged_corpus(tmp_path)
    message = r"a\.jsonl\.zst, line 50: invalid UTF-8 \(byte 0xe9 at 13\): convert the file to UTF-8$"
    with pytest.raises(UserError, match=message):
        make_documents(tmp_path / "strict", files, form="jsonl.zst")
    make_documents(tmp_path / "tolerant", files, form="jsonl.zst", strict=False)
    directory = tmp_path / "left" / "read" / "000000"
    job = corpus._ReadJob(
        Input(Found(tuple(files)), "jsonl.zst"), files[0], (0, files[0].stat().st_size), 1, False, directory
    )
    corpus._read(job)
    with pytest.raises(UserError, match=message):
        corpus._read(dataclasses.replace(job, strict=True))


def test_the_name_of_a_damaged_file_need_not_be_text(tmp_path: Path):
    path = tmp_path / os.fsdecode(b"caf\xe9\xe2\x80\xa8.jsonl")
    path.write_text('{"text": "good"}\n{\n')
    index = make_documents(tmp_path / "documents", [path], strict=False)
    places = index["skipped"]["broken JSON"]["places"]
    assert places == [{"file": f"{tmp_path}/caf\\udce9\u2028.jsonl", "line": 2}]
