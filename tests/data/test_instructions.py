"""From records and templates to rows of instruction samples."""

import collections
import dataclasses
import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import Table, parquet
from rows import FIRST, SHARES, SPECIAL, Documents, build, check_row

from glm_jax.config import default_config, resolve
from glm_jax.config import instructions as entry
from glm_jax.config.data import OBJECTIVES, BlankOptions
from glm_jax.data.corpora import samples
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.corpora.prepare import check_undamaged
from glm_jax.data.instructions import prompts, records
from glm_jax.data.instructions import samples as instruction_samples
from glm_jax.data.instructions.registry import DATASETS
from glm_jax.data.instructions.render import Refused
from glm_jax.data.instructions.samples import SENTENCE_TASKS, sentence_tasks
from glm_jax.data.instructions.templates import Template
from glm_jax.data.rows.blanks import instruction_sample
from glm_jax.errors import UserError

INSTRUCTION = OBJECTIVES.index("instruction")
TOKENIZER: Any = SimpleNamespace(
    mask=SPECIAL.mask,
    eos=SPECIAL.eos,
    prefix=(),
    strips_before_blanks=False,
    digest="d",
    encode=lambda text: np.array([ord(c) for c in text], np.int32),
)


def test_a_document_begins_in_the_prefix_and_leaves_a_last_space_to_the_answer():
    family: Any = SimpleNamespace(**vars(TOKENIZER))
    assert prompts.encode("q: ", "a", family).tolist() == [*b"q: ", SPECIAL.mask, *b"a", SPECIAL.eos]
    family.prefix, family.strips_before_blanks = (7, 8), True
    found = prompts.encode("q: ", "a", family)
    assert found.tolist() == [7, 8, *b"q:", SPECIAL.mask, *b" a", SPECIAL.eos] and found.dtype == np.int32


def document(text, target):
    """Return a document of distinct tokens, `text` of them in the prompt and `target` in the answer."""
    tokens = np.arange(FIRST, FIRST + text + target, dtype=np.int32)
    return np.concatenate([tokens[:text], [SPECIAL.mask], tokens[text:], [SPECIAL.eos]])


class Prompted:
    """Samples in which all ordinary tokens differ."""

    def __init__(self, sizes):
        self.documents = [
            np.where(made >= FIRST, made + 1000 * (i + 10), made)
            for i, made in enumerate(document(text, target) for text, target in sizes)
        ]
        self.lengths = np.array([len(made) for made in self.documents], np.int64)

    def __len__(self):
        return len(self.documents)

    def __getitem__(self, index):
        return self.documents[index]


@given(st.integers(0, 200), st.integers(1, 200), st.sampled_from([16, 64, 512]))
@settings(deadline=None)
def test_a_sample_is_prompt_mask_sop_answer_and_counts_on(text, target, room):
    sample = instruction_sample(document(text, target), SPECIAL, room, BlankOptions())
    whole = target + 2 <= room  # otherwise the answer is cut, which no eop ends
    kept = min(text, room - 2 - target) if whole else 0
    prompt = list(range(FIRST + text - kept, FIRST + text))
    told = [*range(FIRST + text, FIRST + text + min(target, room - 1)), SPECIAL.eop][
        : target + 1 if whole else room - 1
    ]
    assert sample.tokens.tolist() == [*prompt, SPECIAL.mask, SPECIAL.sop, *told[:-1]]
    assert sample.targets.tolist() == [*prompt, SPECIAL.mask, *told]
    assert sample.positions.tolist() == list(range(len(sample)))
    assert sample.context == kept + 1 and len(sample) == min(text + target + 2, room)


def test_two_streams_repeat_the_position_of_the_mask():
    sample = instruction_sample(document(5, 3), SPECIAL, 64, BlankOptions(two_streams=True))
    assert sample.positions.tolist() == [0, 1, 2, 3, 4, 5, 5, 5, 5, 5]
    assert sample.block_positions.tolist() == [0] * 6 + [1, 2, 3, 4]


def test_an_answer_may_fill_a_gmask() -> None:
    sample = instruction_sample(document(5, 3), SPECIAL, 64, BlankOptions(instruction_blank="gmask"))
    assert sample.tokens[5] == SPECIAL.gmask != SPECIAL.mask
    assert sample.positions.tolist() == list(range(10))


def test_a_prompt_that_is_cut_keeps_the_prefix() -> None:
    special: Any = SimpleNamespace(**{**vars(SPECIAL), "prefix": (90, 91)})
    long = np.concatenate([np.array([90, 91], np.int32), document(20, 3)])
    sample = instruction_sample(long, special, 12, BlankOptions())
    prompt = list(range(FIRST + 15, FIRST + 20))  # 2 of the prefix, 5, the blank, sop and 3 of the answer
    assert sample.tokens.tolist() == [90, 91, *prompt, special.mask, special.sop, *range(FIRST + 20, FIRST + 23)]


@pytest.mark.parametrize("whole", [False, True])
def test_rows_mix_in_at_their_share_and_each_sample_comes_once_an_epoch(whole):
    tasks = Prompted([(3 + i % 9, 1 + i % 4) for i in range(53)])
    made = build(
        {"en": Documents([4000])}, {"en": 1.0, "tasks": 1.0}, 128, {"mask": 0.285, "gmask": 0.665, "instruction": 0.05},
        instructions={"tasks": tasks}, options=BlankOptions(whole_documents=whole),
    )  # fmt: skip
    batch = made.at(0, 1200)
    mine = np.flatnonzero(batch.objective == INSTRUCTION)
    assert abs(len(mine) - 60) <= 1 and (batch.source[mine] == 1).all()
    assert (np.delete(batch.source, mine) == 0).all()
    seen = collections.defaultdict(list)
    for b in mine.tolist():
        texts = check_row(batch, b, BlankOptions())
        assert len(texts) <= 4 or whole
        seen[made.locate(b).epoch] += [int(text[0]) for text in texts]
    expected = sorted(int(tasks[i][0]) for i in range(53))
    complete = max(seen)
    assert complete >= 3 and all(sorted(seen[epoch]) == expected for epoch in range(complete))
    rows = 53 / np.mean([batch.segments[b].max() for b in mine.tolist()])
    assert rows > 12 if not whole else rows < 9


def test_samples_too_long_are_cut_and_leave_their_room_to_others():
    options = BlankOptions(whole_documents=True, instruction_segments=4)
    tasks = Prompted([(100, 9)] * 8)
    made = build({}, {"tasks": 1.0}, 128, {"instruction": 1.0}, instructions={"tasks": tasks}, options=options)
    assert made.rows_per_epoch == 2
    for row in made.at(0, 2).segments:
        assert np.bincount(row).tolist() == [0, 32, 32, 32, 32]


def test_a_share_of_instructions_needs_a_source_of_its_own():
    shares = {**SHARES, "instruction": 0.05}
    with pytest.raises(UserError, match="instruction has a share of the rows but no source"):
        build(objectives=shares)
    with pytest.raises(UserError, match="the same name"):
        build(objectives=shares, instructions={"en": Prompted([(3, 2)])})
    with pytest.raises(UserError, match="instruction samples have 8 places"):
        build(objectives=shares, instructions={"tasks": Prompted([(3, 2)])})


def write_lines(path, records):
    path.write_text("".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records), encoding="utf-8")
    return path


def test_records_are_read_from_every_format(tmp_path):
    rows = [{"text": f"问 {i}", "label": i} for i in range(5)]
    lines = write_lines(tmp_path / "a.jsonl", rows)
    (tmp_path / "b.jsonl.zst").write_bytes(zstandard.compress(lines.read_bytes()))
    parquet.write_table(Table.from_pylist(rows), tmp_path / "c.parquet")
    (tmp_path / "d.json").write_text(json.dumps(rows, ensure_ascii=False, indent=None).replace("}, ", "},\n"))
    for path in sorted(tmp_path.iterdir()):
        found = list(records.read_records([path]))
        assert [record for _, record in found] == rows
        assert str(found[2][0]) == f"{path}, line 3"
    (tmp_path / "train.json").write_bytes(lines.read_bytes())  # as CLUE names its files
    assert [record for _, record in records.read_records([tmp_path / "train.json"], "jsonl")] == rows


C3 = [[["男：几点？", "女：八点。"], [{"question": "几点？", "choice": ["七点", "八点"], "answer": "八点"}], "1-0"]]
CMRC = [{"context": "话说天下大势", "qas": [{"question": "什么大势？", "answers": ["天下"]}], "id": 7}]


@pytest.mark.parametrize(
    ("records", "template", "expected"),
    [
        (
            C3,
            "{{ record[0] | join(' ') }} {{ record[1][0].question }} {{ record[1][0].choice | join('、') }}"
            " ||| {{ record[1][0].answer }}",
            ("男：几点？ 女：八点。 几点？ 七点、八点", "八点"),
        ),
        (
            C3,
            "{% if record[1] | length > 1 %}{{ record[1][1].question }} ||| {{ record[1][1].answer }}{% endif %}",
            None,
        ),
        (CMRC, "{{ context }} {{ qas[0].question }} ||| {{ qas[0].answers[0] }}", ("话说天下大势 什么大势？", "天下")),
    ],
)
@pytest.mark.parametrize("form", ["json", "jsonl"])
def test_records_of_clue(tmp_path, records, template, expected, form):
    path = tmp_path / f"a.{form}"
    path.write_text(json.dumps(records, ensure_ascii=False, indent=2))
    if form == "jsonl":
        write_lines(path, records)
    assert read(path, [Template("t", template)], 0) == [expected]


@pytest.mark.parametrize(
    ("name", "content", "line", "message"),
    [
        ("a.jsonl", b'{"text": 1}\n{"text"\n{"text": 2}\n', 2, "broken JSON"),
        ("a.jsonl", b"1\n", 1, "not a JSON object"),
        ("a.jsonl", b'{"text": "\xff"}\n', 1, "invalid UTF-8"),
        ("a.jsonl", b"", 1, "empty"),
        ("a.json", b'[{"text": 1},\n{"text"}]', 2, "broken JSON"),
        ("a.json", b'{"text": 1}\n', 1, "take the array of records out of it"),
        ("a.jsonl.zst", b"nothing", 1, "not a whole zstd file"),
        ("a.parquet", b"nothing", 1, "not a parquet file"),
    ],
)
def test_damaged_records_are_told_with_their_place(tmp_path, name, content, line, message):
    (tmp_path / name).write_bytes(content)
    found = records.read_records([tmp_path / name])
    ((place, told),) = [(place, one.message) for place, one in found if isinstance(one, Refused)]
    assert place == records.Place(tmp_path / name, line) and message in told


def test_a_file_of_no_known_form_is_refused(tmp_path):
    (tmp_path / "a.csv").write_text("a,b\n")
    with pytest.raises(UserError, match="a.csv is not a file of records .jsonl, .*set the set's `format`"):
        list(records.read_records([tmp_path / "a.csv"]))


def read(path, templates, cap) -> list[Any]:
    return [answer for _, answer in prompts.prompted([path], templates, cap)]


def test_a_cap_takes_pairs_of_records_and_templates_evenly(tmp_path):
    path = write_lines(tmp_path / "a.jsonl", [{"n": i} for i in range(300)])
    templates = [Template(kind, kind + " {{ n }} ||| yes") for kind in ("first", "second")]
    everything = read(path, templates, 0)
    assert len(everything) == 600 and everything[:2] == [("first 0", "yes"), ("second 0", "yes")]
    some = read(path, templates, 200)
    assert len(set(some)) == 200 and some == read(path, templates, 200)
    assert 70 < sum(text.startswith("first") for text, _ in some) < 130
    assert 70 < sum(int(text.split()[1]) < 150 for text, _ in some) < 130
    assert read(path, templates, 600) == everything


RECORDS = [
    {"text": "good", "choices": ["no", "yes"], "label": 1},
    {"text": "good", "choices": ["no", "yes"], "label": -1},
    {"text": "good", "choices": ["no", "yes"], "label": 2},
    {"text": "good", "choices": [], "label": 0},
    {"text": "good", "choices": ["", ""], "label": 0},
    {"text": "skip", "choices": ["no", "yes"], "label": 0},
    {"choices": ["no", "yes"], "label": 0},
    {"text": "good\0", "choices": ["no", "yes"], "label": 0},
    {"text": "\ud800", "choices": ["no", "yes"], "label": 0},
    {"text": "good", "choices": ["no", "yes"], "label": 0},
]
REASONS = {  # the lines of RECORDS, counted from 1, and of two more that are no records
    "template fails": [2, 3, 4, 7],
    "empty answer": [5],
    "NUL": [8],
    "invalid UTF-8": [9],
    "broken JSON": [11],
    "missing field": [12],
}


def prepare(section, cache, heldout=0.0, room=64, *, strict=True):
    return prompts.prepare(section, TOKENIZER, cache, heldout=heldout, room=room, strict=strict)


def account(folder, *, strict, more="", start=0):
    """Prepare a set of RECORDS from `start` on, with two damaged lines at its end; return it and the reported lines."""
    data = folder / "data.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in RECORDS[start:]) + '{"text"\n1\n')
    jinja = folder / "ask.jinja"
    jinja.write_text("{% if text != 'skip' %}{{ text }} ||| {{ choices[label] }}" + more + "{% endif %}")
    lines = []
    section = {"asked": entry(path=str(data), templates=str(jinja))}
    sets, _ = prepare(section, Cache(folder / "cache", lines.append), strict=strict)
    return sets["asked"], lines


def test_every_record_without_a_prompt_is_accounted_for(tmp_path):
    sides, lines = account(tmp_path, strict=False)
    asked = sides.train
    assert len(asked) == 2 and asked.index["samples"] == 2 and asked.index["unasked"] == 1
    places = {
        reason: [place["line"] for place in skipped["places"]] for reason, skipped in asked.index["skipped"].items()
    }
    assert places == REASONS
    assert {reason: skipped["count"] for reason, skipped in asked.index["skipped"].items()} == {
        reason: len(lines) for reason, lines in REASONS.items()
    }
    assert lines[0] == "instructions asked: 2 samples to train on, 0 held out, 17 tokens, 1 with nothing to ask"
    assert lines[1].startswith(
        f"instructions asked: left out 4 template fails, the first in {tmp_path}/data.jsonl, line 2 ("
    ) and len(lines) == 1 + len(REASONS)
    (written,) = (tmp_path / "cache").rglob("skipped.jsonl")
    left = [json.loads(line) for line in written.read_text().splitlines()]
    assert [record["line"] for record in left] == sorted(sum(REASONS.values(), []))
    assert "the index -1 is negative" in left[0]["message"] and left[0]["file"] == str(tmp_path / "data.jsonl")


def test_strict_stops_at_the_first_and_leaves_nothing(tmp_path):
    with pytest.raises(UserError, match="data.jsonl, line 2: template ask fails .the index -1"):
        account(tmp_path, strict=True)
    assert not [path for path in (tmp_path / "cache" / "instructions").rglob("*") if path.is_file()]
    account(tmp_path, strict=False)
    account(tmp_path, strict=True)  # what an earlier build left out stays left out


def test_when_nothing_is_left_the_first_damage_is_named(tmp_path):
    with pytest.raises(UserError, match="asked has no samples: .*line 1: template ask gives 2 of"):
        account(tmp_path, strict=False, more=" ||| more")
    assert not [path for path in (tmp_path / "cache" / "instructions").rglob("*") if path.is_file()]


def test_a_strict_build_finds_what_an_earlier_one_left_out(tmp_path):
    asked, _ = account(tmp_path, strict=False)
    prepared: Any = SimpleNamespace(indexes={}, instructions={"asked": asked})
    with pytest.raises(UserError, match="line 2: template fails, left out of asked by an earlier build"):
        check_undamaged(prepared)


def test_a_set_of_templates_over_their_budget_stops_soon(tmp_path, monkeypatch):
    monkeypatch.setattr(prompts, "MOST_EXCEEDING", 3)
    path = write_lines(tmp_path / "a.jsonl", [{"n": 10**12}] * 5)
    with pytest.raises(UserError, match="line 3: template t takes more than 512 MB .*number 3"):
        list(prompts.prompted([path], [Template("t", "{{ 'a' * n }} ||| x")], 0))


def test_prepare_writes_once_and_reads_back(tmp_path):
    data = tmp_path / "data.jsonl"
    write_lines(data, [{"text": "1+1=", "target": "2"}, {"text": "", "target": "x"}])
    (tmp_path / "super_glue" / "rte").mkdir(parents=True)
    (tmp_path / "super_glue" / "rte" / "ask.jinja").write_text("{{ text }}? ||| {{ target }}")
    section = {
        "sums": entry(path=str(data), weight=2.0),
        "rte": entry(path=str(data), dataset="super_glue/rte", templates=str(tmp_path)),
    }
    lines = []
    sets, weights = prepare(section, Cache(tmp_path / "cache", lines.append))
    assert (
        weights == {"sums": 2.0, "rte": 2.0}
        and lines[0] == "instructions sums: 2 samples to train on, 0 held out, 10 tokens"
    )
    assert sets["sums"].train[0].tolist() == [*b"1+1=", SPECIAL.mask, *b"2", SPECIAL.eos]
    assert sets["sums"].train[1].tolist() == [SPECIAL.mask, *b"x", SPECIAL.eos]
    assert sets["rte"].train[0].tolist() == [*b"1+1=?", SPECIAL.mask, *b"2", SPECIAL.eos]
    written = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")}
    again, _ = prepare(section, Cache(tmp_path / "cache", lines.append))
    assert {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*")} == written
    assert again["rte"].train.lengths.tolist() == sets["rte"].train.lengths.tolist() == [8, 4]
    (tmp_path / "super_glue" / "rte" / "ask.jinja").write_text("{{ text }} ||| {{ target }}")
    again, _ = prepare(section, Cache(tmp_path / "cache", lines.append))
    assert again["rte"].train.lengths.tolist() == [7, 3]
    section = {"rte": entry(path=str(data), dataset="super-glue/rte", templates=str(tmp_path))}
    assert prepare(section, Cache(tmp_path / "cache", lines.append))[1] == {"rte": 2.0}


def test_a_known_data_set_is_capped_as_in_the_paper_unless_told_otherwise(tmp_path, monkeypatch):
    data = write_lines(tmp_path / "a.jsonl", [{"text": str(i), "target": "x"} for i in range(9)])
    monkeypatch.setitem(prompts.DATASETS, "xsum", dataclasses.replace(DATASETS["xsum"], cap=4))
    section = {
        "capped": entry(path=str(data), dataset="xsum"),
        "own": entry(path=str(data), dataset="xsum", cap=6),
        "other": entry(path=str(data)),
    }
    _, weights = prepare(section, Cache(tmp_path / "cache", lambda line: None))
    assert weights == {"capped": 4.0, "own": 6.0, "other": 9.0}


def test_a_set_to_score_alone_has_no_weight(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", [{"text": str(i), "target": "x"} for i in range(99)])
    section = {"shown": entry(path=str(data)), "unshown": entry(path=str(data), score_only=True)}
    sets, weights = prepare(section, Cache(tmp_path / "cache", lambda line: None), heldout=0.2)
    assert list(weights) == ["shown"] and len(sets["unshown"].heldout) == len(sets["shown"].heldout) > 0
    with pytest.raises(UserError, match="unshown is score_only, and none of its records is held out"):
        prepare(section, Cache(tmp_path / "cache", lambda line: None))
    config = default_config()
    config.data.instructions.unshown = entry(path=str(data), score_only=True, weight=2.0)
    with pytest.raises(UserError, match=r"data\.instructions\.unshown.*leave out weight"):
        resolve(config)


def test_a_sentence_is_asked_about_if_it_is_short():
    documents = ["Return the longest word.\n\nMore.", "Return the longest word.", "Too short.", "No sentence at all"]
    asked = {name: list(sentence_tasks(*task, documents)) for name, task in SENTENCE_TASKS.items()}
    assert all(len(found) == 1 and found[0][0].startswith("Return the longest word.\n") for found in asked.values())
    answers = {name: found[0][1] for name, found in asked.items()}
    assert answers == {"copy": "Return the longest word", "count": "4", "first": "Return", "last": "word",
                       "longest": "longest", "second": "the"}  # fmt: skip


def test_mistakes_in_the_section_are_refused(tmp_path):
    data = write_lines(tmp_path / "a.jsonl", [{"text": "a", "target": ""}])
    for section, message in (
        ({"a": entry(path=str(data))}, "a.jsonl, line 1: the answer is empty"),
        ({"a": entry(path=str(data), dataset="super_glue/rt")}, "did you mean super_glue/rte"),
        ({"a": entry(path=str(tmp_path / "none"))}, "does not exist"),
        ({"a": entry(sample="reviews")}, "no example set 'reviews': choose one of aligned-manuals"),
    ):
        with pytest.raises(UserError, match=message):
            prepare(section, Cache(tmp_path / "cache", print))


def test_an_example_set_out_of_reach_is_left_out(tmp_path, monkeypatch):
    def unreachable(name, cache):
        raise samples.Unreachable("no index")

    monkeypatch.setattr(instruction_samples, "fetch", unreachable)
    lines = []
    section = {"reviews": entry(sample="chinese-reviews")}
    assert prepare(section, Cache(tmp_path, lines.append)) == ({}, {})
    assert lines == ["instructions reviews: left out, no index"]
