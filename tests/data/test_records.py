"""The shapes of records, against prompts and answers written by hand, and the samples and rows that follow."""

import json
from pathlib import Path
from typing import Any

import pytest
from pyarrow import Table, parquet
from test_instructions import TOKENIZER, prepare, write_lines

from glm_jax.config import instructions as entry
from glm_jax.data.corpora.cache import Cache
from glm_jax.data.instructions import prompts, records
from glm_jax.data.instructions.records import MOST_TURNS
from glm_jax.data.instructions.render import Refused
from glm_jax.errors import UserError


def turns(*said: tuple[str, str], role: str = "role", content: str = "content") -> list[dict[str, str]]:
    return [{role: who, content: what} for who, what in said]


THREE = turns(
    ("system", "Be brief."), ("user", "1+1?"), ("assistant", "2"), ("user", "More?"), ("user", "2+2?"),
    ("assistant", "4\n\nYes."), ("assistant", "Next?"), ("user", "Bye"),
)  # fmt: skip
FIRST = "system: Be brief.\n\nuser: 1+1?\n\nassistant:"
SECOND = FIRST + " 2\n\nuser: More?\n\nuser: 2+2?\n\nassistant:"
THREE_SAMPLES = [(FIRST, "2"), (SECOND, "4\n\nYes."), (SECOND + " 4\n\nYes.\n\nassistant:", "Next?")]

SHAPES: list[tuple[dict[str, Any], list[tuple[str, str]]]] = [
    ({"text": " a ", "target": " b"}, [(" a ", " b")]),  # as they are, white space included
    ({"text": "", "target": "b"}, [("", "b")]),
    ({"prompt": "a", "answer": "b", "": 7}, [("a", "b")]),
    ({"prompt": "a", "completion": "b"}, [("a", "b")]),
    ({"prompt": "a", "response": "b"}, [("a", "b")]),
    ({"question": "a", "answer": "b"}, [("a", "b")]),
    ({"instruction": "a", "output": "b"}, [("a", "b")]),
    ({"instruction": "Add.", "input": "1 and 2", "output": "3", "text": "all of it"}, [("Add.\n\n1 and 2", "3")]),
    ({"instruction": "a", "input": " \n", "output": "b"}, [("a", "b")]),
    ({"instruction": "a", "input": None, "output": "b"}, [("a", "b")]),
    ({"text": "a", "target": "b", "question": "c", "answer": "d"}, [("a", "b")]),  # the first pair
    ({"text": "a", "target": None, "question": "c", "answer": "d"}, [("c", "d")]),
    ({"messages": None, "conversations": None, "prompt": "a", "response": "b"}, [("a", "b")]),
    ({"messages": THREE, "prompt": "1+1?", "answer": "2"}, THREE_SAMPLES),  # a chat before any pair
    ({"messages": turns(("assistant", " Hello \n"))}, [("assistant:", "Hello")]),
    (
        {"conversations": turns(("human", "a"), ("gpt", "b"), ("system", "c"), role="from", content="value")},
        [("user: a\n\nassistant:", "b")],
    ),
]
DAMAGED: list[tuple[dict[str, Any], str, str]] = [
    ({}, "missing field", "it is empty"),
    ({"text": "a", "answer": "b"}, "missing field", "(it has text, answer): add them or give templates"),
    ({"text": "a", "target": 7}, "not text", "text or target is not text"),
    ({"instruction": "a", "input": ["b"], "output": "c"}, "not text", "instruction or input or output is not text"),
    ({"text": "a", "target": " "}, "empty answer", "the answer is empty"),
    ({"text": "a\0", "target": "b"}, "NUL", "a NUL character"),
    ({"messages": "user: a"}, "not a chat", "messages is not a list of turns"),
    ({"messages": [], "text": "a", "target": "b"}, "no answer", "messages has no turn of the assistant"),
    ({"messages": turns(("user", "a"))}, "no answer", "no turn of the assistant"),
    ({"messages": ["a"]}, "unknown role", "turn 1 of messages has no role of system, user, assistant"),
    ({"messages": turns(("user", "a"), ("tool", "b"), ("assistant", "c"))}, "unknown role", "turn 2 of messages"),
    ({"messages": [{"role": ["user"], "content": "a"}]}, "unknown role", "turn 1"),
    ({"messages": turns(("user", ""), ("assistant", "a"))}, "empty turn", "turn 1 of messages is empty"),
    ({"messages": turns(("user", "a"), ("assistant", "\n"))}, "empty turn", "turn 2 of messages is empty"),
    ({"messages": [{"role": "assistant", "content": None}]}, "not text", "content of turn 1 of messages is not text"),
    ({"messages": [{"role": "user", "content": [{"text": "a"}]}]}, "not text", "content of turn 1"),
    ({"messages": turns(("user", "a\0"), ("assistant", "b"))}, "NUL", "a NUL character"),
    ({"messages": turns(("assistant", "\ud800"))}, "invalid UTF-8", "half a surrogate pair"),
    ({"messages": turns(("assistant", "a")) * (MOST_TURNS + 1)}, "too many turns", "1,001 turns, over 1,000: split"),
    ({"conversations": turns(("human", "a"), role="from")}, "not text", "value of turn 1 of conversations"),
]


def samples(path: Path, cap: int = 0) -> list[Any]:
    return [answer for _, answer in prompts.prompted([path], [], cap)]


@pytest.mark.parametrize("record, expected", SHAPES)
def test_every_shape_gives_its_prompts_and_answers(record: dict[str, Any], expected: list[tuple[str, str]]) -> None:
    found = records.read(record)
    assert not isinstance(found, Refused)
    assert [found.job(number, 0) for number in range(len(found))] == expected


@pytest.mark.parametrize("record, reason, message", DAMAGED)
def test_damage_is_named_and_costs_the_record(record: dict[str, Any], reason: str, message: str) -> None:
    found = records.read(record)
    assert isinstance(found, Refused) and found.reason == reason and message in found.message


def test_shapes_may_be_mixed_and_the_cap_counts_samples(tmp_path: Path) -> None:
    rows = [record for record, _ in SHAPES]
    path = write_lines(tmp_path / "a.jsonl", rows + [{"messages": turns(("user", "a"))}])
    *found, last = samples(path)
    assert found == [sample for _, expected in SHAPES for sample in expected] and last.reason == "no answer"
    some = [sample for sample in samples(path, 5) if not isinstance(sample, Refused)]
    rest = iter(found)
    assert len(some) == 5 and all(sample in rest for sample in some)  # in their order
    assert samples(path, 5) == [*some, last]  # the same in every run
    assert samples(path, len(found)) == [*found, last]
    table = tmp_path / "a.parquet"
    plain = rows[:13] + rows[14:15]  # with chats of one kind, as a column has one type
    names = {name for record in plain for name in record if name != "conversations"}
    parquet.write_table(Table.from_pylist([{name: record.get(name) for name in names} for record in plain]), table)
    assert samples(table) == [sample for _, expected in SHAPES[:13] + SHAPES[14:15] for sample in expected]


def test_each_answer_of_a_chat_is_tokenised_after_all_turns_before_it(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"messages": THREE}])
    lines: list[str] = []
    sets, weights = prepare({"chat": entry(path=str(path))}, Cache(tmp_path / "cache", lines.append), room=500)
    assert weights == {"chat": 3.0}
    documents = [sets["chat"].train[number] for number in range(3)]
    assert [document.tolist() for document in documents] == [
        [*map(ord, text), TOKENIZER.mask, *map(ord, target), TOKENIZER.eos] for text, target in THREE_SAMPLES
    ]


def chats(count: int) -> list[dict[str, Any]]:
    return [
        {"messages": turns(*[("user", f"{n}+{k}?"), ("assistant", f"{n + k}")] * 2), "id": n}
        for n in range(count)
        for k in (n % 3,)
    ]


def test_a_record_is_held_out_with_all_its_samples_whatever_the_order(tmp_path: Path) -> None:
    def prepared(rows: list[dict[str, Any]], heldout: float) -> tuple[list[str], list[str]]:
        """Return the texts of each side, from files of half the records each."""
        folder = tmp_path / f"{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        write_lines(folder / "a.jsonl", rows[: len(rows) // 2])
        write_lines(folder / "b.jsonl", rows[len(rows) // 2 :])
        sets, weights = prepare(
            {"chat": entry(path=str(folder))}, Cache(tmp_path / "cache", lambda line: None), heldout, 500
        )
        assert weights["chat"] == len(sets["chat"].train)
        train, held = [
            ["".join(map(chr, side[number])) for number in range(len(side))]
            for side in (sets["chat"].train, sets["chat"].heldout)
        ]
        return train, held

    def said(texts: list[str]) -> set[str]:
        return {text.split("?")[0] for text in texts}  # each chat begins with a question of its own

    train, held = prepared(chats(400), 0.2)
    assert len(train) + len(held) == 800 and not said(train) & said(held)
    assert all(len([text for text in held if text.startswith(f"{one}?")]) == 2 for one in said(held))
    assert 0.13 < len(held) / 800 < 0.27
    again, same = prepared(chats(400)[::-1], 0.2)
    assert sorted(again) == sorted(train) and sorted(same) == sorted(held)
    more, _ = prepared(chats(500), 0.2)
    assert said(train) <= said(more)  # whatever else there is
    _, fewer = prepared(chats(400), 0.1)
    assert set(fewer) < set(held)
    copies = [{**record, "id": -record["id"]} for record in chats(400)]  # identical but for what nobody reads
    train, held = prepared(chats(400) + copies, 0.2)
    assert len(train) + len(held) == 1600 and not said(train) & said(held)
    assert prepared(chats(400), 0.0)[1] == []
    assert len(prepared(chats(10), 0.001)[1]) == 2  # ten records hold out one
    assert prepared([{"text": "", "target": f"{n}?"} for n in range(100)], 0.5)[1]  # answers tell records apart, too
    few, none = prepared(chats(9), 0.001)
    assert len(few) == 18 and not none


def test_templates_share_the_side_of_their_record(tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"n": n, "more": {"b": 1, "a": n}} for n in range(100)])
    write_lines(tmp_path / "b.jsonl", [{"more": {"a": n, "b": 1}, "n": n} for n in range(100)])
    for name in ("one", "two", "three"):
        (tmp_path / f"{name}.jinja").write_text(f"{name} {{{{ n }}}} ||| yes")
    section = {"a": entry(path=str(path.parent / "*.jsonl"), templates=str(tmp_path))}
    sets, _ = prepare(section, Cache(tmp_path / "cache", lambda line: None), 0.3)
    train, held = (
        [int("".join(map(chr, side[i])).split()[1].partition(chr(TOKENIZER.mask))[0]) for i in range(len(side))]
        for side in (sets["a"].train, sets["a"].heldout)
    )
    assert len(train) + len(held) == 600 and held and not set(train) & set(held)
    assert all(held.count(n) == 6 for n in held)  # by every template, in both files


def test_what_does_not_fit_is_counted_and_told(tmp_path: Path) -> None:
    sizes = [(3, 2), (40, 20), (200, 62), (5, 63), (5, 62)]
    path = write_lines(tmp_path / "a.jsonl", [{"text": "a" * text, "target": "b" * n} for text, n in sizes])
    lines: list[str] = []
    sets, weights = prepare({"a": entry(path=str(path))}, Cache(tmp_path / "cache", lines.append))
    assert weights == {"a": 4.0} and sets["a"].train.lengths.tolist() == [7, 62, 264, 69]
    assert (sets["a"].cut, sets["a"].left_out) == (2, 1)
    assert lines[-1] == (
        "instructions a: 2 prompts cut at their beginning, 1 samples left out because their answers have over 62 "
        "tokens; a sample has 64 places, which is data.seq_length divided by data.blanks.instruction_segments"
    )
    lines.clear()
    prepare({"a": entry(path=str(path))}, Cache(tmp_path / "cache", lines.append), 1e-9, 300)
    assert lines == ["instructions a: 5 samples to train on, 0 held out (too few records), 472 tokens"]
    write_lines(path, [{"text": "a", "target": "b" * 63}])
    with pytest.raises(UserError, match="data.instructions.a has no answer of at most 62 tokens to train on: raise"):
        prepare({"a": entry(path=str(path))}, Cache(tmp_path / "cache", lines.append))


def test_damaged_chats_are_counted_by_reason_with_their_places(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    rows = [record for record, _, _ in DAMAGED if "messages" in record]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in [{"prompt": "a", "answer": "b"}, *rows]))
    sets, _ = prepare({"a": entry(path=str(path))}, Cache(tmp_path / "cache", lambda line: None), strict=False)
    expected: dict[str, list[int]] = {}
    for line, reason in enumerate((reason for record, reason, _ in DAMAGED if "messages" in record), 2):
        expected.setdefault(reason, []).append(line)
    skipped = sets["a"].train.index["skipped"]
    assert {reason: [place["line"] for place in one["places"]] for reason, one in skipped.items()} == expected
    assert sum(one["count"] for one in skipped.values()) == len(rows)
