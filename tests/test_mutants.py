"""The arithmetic of tests/proofs/mutants.py: which mutants are drawn, which remain to run, their order, and counts."""

import collections
from pathlib import Path
from typing import Any

from tests.proofs import mutants, mutants_draw, mutants_tests
from tests.proofs.mutants_draw import Mutant
from tests.proofs.mutants_tests import IMPORTED, Outcome, TestFile

NONE: dict[tuple[str, str, str], str] = {}


def mutant(room: str, number: int, operator: str = "core/AddNot", line: int = 1) -> Mutant:
    return Mutant(room, f"{room}.py", operator, number, ((line, 0), (line, 1)), "digest", f"{room} {number}")


def result(name: str, status: str, room: str = "model", **fields: Any) -> dict[str, Any]:
    entry = {"kind": "result", "key": name, "room": room, "path": f"{name}.py", "line": 7, "operator": "core/AddNot"}
    return {**entry, "before": "old", "after": "new", "covered": True, "status": status, **fields}


def test_rooms_share_a_sample_by_their_sizes_above_a_floor() -> None:
    assert mutants_draw.shares({"a": 900, "b": 90, "c": 7, "d": 3}, 100) == {"a": 90, "b": 9, "c": 5, "d": 3}
    assert mutants_draw.shares({"a": 2, "b": 1}, 10) == {"a": 2, "b": 1}
    assert mutants_draw.shares({"a": 500, "b": 501}, 7) == {"a": 4, "b": 4}  # never fewer than asked for


def test_a_draw_is_seeded_and_takes_each_place_once() -> None:
    many = [mutant(room, number, operator) for room, size in (("a", 300), ("b", 100)) for number in range(size)
            for operator in ("core/One", "core/Two")]  # fmt: skip
    drawn = mutants_draw.draw(many, 80, 1, lambda one: True)
    assert drawn == mutants_draw.draw(many, 80, 1, lambda one: True)
    assert collections.Counter(one.room for one in drawn) == {"a": 60, "b": 20}
    assert len({one.place for one in drawn}) == 80
    assert 20 < sum(one.operator == "core/One" for one in drawn) < 60  # 80 fair coins are outside with 1 in 10^5
    other = mutants_draw.draw(many, 80, 2, lambda one: True)
    assert len({one.place for one in drawn} & {one.place for one in other}) < 40  # 17 are expected by chance


def test_an_edit_elsewhere_leaves_a_draw_alone() -> None:
    many = [mutant("a", number) for number in range(200)]
    drawn = mutants_draw.draw(many, 50, 1, lambda one: True)
    gone = set(drawn[:5])
    fewer = mutants_draw.draw([one for one in many if one not in gone], 45, 1, lambda one: True)
    assert fewer == drawn[5:]


def test_what_does_not_compile_gives_its_place_to_another() -> None:
    many = [mutant("a", number, operator) for number in range(9) for operator in ("core/One", "core/Two")]
    drawn = mutants_draw.draw(many, 9, 1, lambda one: one.operator == "core/Two")
    assert len(drawn) == 9 and {one.operator for one in drawn} == {"core/Two"}
    assert not mutants_draw.draw(many, 9, 1, lambda one: False)


SOURCE = """
__all__ = ["f"][0:1]
Rows = tuple[int, ...] | None
LIMIT = 1 | 2
def f(x: "int | None" = 3, *, y=(4)) -> list[5]:
    if x is 6 or "é" == x:
        raise ValueError(f"数 {x + 7}", 8, y=-x)
    return g(*x) + 9
"""


def text_of(span: mutants_draw.Span) -> str:
    (first, left), (last, right) = span
    assert first == last
    return SOURCE.split("\n")[first - 1][left:right]


def test_what_cannot_change_behaviour_is_left_out() -> None:
    found = {text_of(span): reason for span, reason in mutants_draw.silent_spans(SOURCE)}
    assert found == {
        '__all__ = ["f"][0:1]': mutants_draw.NAMES,
        "Rows = tuple[int, ...] | None": mutants_draw.ANNOTATION,
        '"int | None"': mutants_draw.ANNOTATION,
        "list[5]": mutants_draw.ANNOTATION,
        'f"数 {x + 7}"': mutants_draw.WORDS,
        "8": mutants_draw.WORDS,
        "-x": mutants_draw.WORDS,
    }
    binary, literal = mutants_draw.gaps(SOURCE)
    assert sorted(text_of(span) for span in binary) == [" + ", " + ", " | ", " | "]
    assert sorted(text_of(span) for span in literal) == [" == ", " is "]


def test_what_is_finished_does_not_run_again(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    for entry in (result("one", "killed"), result("two", "survived"), result("three", "broken")):
        mutants.append_line(path, entry)
    with open(path, "a") as file:
        file.write('{"kind": "result", "key": "fo')  # killed while it wrote
    mutants.append_line(path, result("five", "timeout"))
    keys = ["five", "four", "three", "two", "one"]
    results = mutants.newest(mutants.read_lines(path), NONE)
    assert mutants.remaining(keys, results) == ["four", "three"]
    assert mutants.remaining(keys, results, ["survived"]) == ["four", "three", "two"]
    mutants.append_line(path, result("two", "killed"))
    assert mutants.newest(mutants.read_lines(path), NONE)["two"]["status"] == "killed"


def test_the_table_counts_time_as_killed_and_equivalents_apart() -> None:
    statuses = ["killed"] * 5 + ["timeout"] + ["survived"] * 3
    entries = [result(f"m{number}", status) for number, status in enumerate(statuses)]
    entries += [result("old", "survived"), result("d0", "killed", "data"), result("d1", "survived", covered=False)]
    sample = {"kind": "sample", "rooms": {"model": 1000, "data": 50, "none": 0}}
    sample |= {"keys": [f"m{number}" for number in range(9)] + ["d0", "d1", "d2"]}
    sample |= {"room_of": ["model"] * 9 + ["data"] * 3}
    said = [f"m{number}.py\tcore/AddNot\tnew\tboth give the same" for number in (0, 7)]  # m0 was noticed nonetheless
    known = mutants.known_equivalents("\n".join(["# path, ...", "", *said, ""]))
    text = mutants.table([{**sample, "keys": ["old"], "room_of": ["model"]}, sample, *entries], known)
    lines = text.splitlines()
    assert lines[2:6] == [
        "| model | 1000 | 9 | 5 | 1 | 1 | 2 | 75.0 |",
        "| data | 50 | 3 | 1 | 0 | 0 | 1 | 50.0 |",
        "| none | 0 | 0 | 0 | 0 | 0 | 0 | - |",
        "| all | 1050 | 12 | 6 | 1 | 1 | 3 | 70.0 |",
    ]
    assert "1 not finished" in lines[7]
    assert [line for line in lines if line.startswith("- ")] == [
        "- m6.py:7 AddNot: `old` -> `new`: survived",
        "- m8.py:7 AddNot: `old` -> `new`: survived",
        "- d1.py:7 AddNot: `old` -> `new`: survived, no test runs the line",
    ]


class Fake:
    """A copy whose runs end as told, and which remembers them."""

    def __init__(self, *ends: tuple[str, str]) -> None:
        self.ends, self.ran = list(ends), []

    def run(self, files: list[str], order: list[str], limit: float) -> Outcome:
        self.ran.append(files)
        status, by = self.ends.pop(0)
        return Outcome(status, by, "", 1.0, {})


def test_a_failure_that_does_not_repeat_kills_nothing() -> None:
    def settled(*ends: tuple[str, str]) -> tuple[str, list[str], list[list[str]]]:
        copy: Any = Fake(*ends)
        outcome, unsteady = mutants.settle(copy, ["a", "b"], ["a::1"], 9.0, lambda test: test == "a::1")
        assert not copy.ends
        return outcome.status, unsteady, copy.ran

    both = ["a", "b"]
    assert settled(("passed", "")) == ("passed", [], [both])
    assert settled(("timeout", "")) == ("timeout", [], [both])
    assert settled(("failed", "a::1")) == ("failed", [], [both])
    assert settled(("failed", "b::1"), ("failed", "b::1")) == ("failed", [], [both, ["b::1"]])
    assert settled(("failed", ""), ("failed", "")) == ("failed", [], [both, both])  # a signal names no test
    once = ("failed", "b::1"), ("passed", "")
    assert settled(*once, ("passed", "")) == ("passed", ["b::1"], [both, ["b::1"], both])
    assert settled(*once, ("failed", "a::1")) == ("failed", ["b::1"], [both, ["b::1"], both])
    assert settled(*once, *once, *once)[:2] == ("passed", ["b::1"] * 3)


MODULE = """import x
LIMIT = 3

def f(
    a=1,
):
    return LIMIT

def g():
    return (
        4)

def h(a):
    if a:
        return 5
    return 6
"""


def on_clean(path: str, text: str, seconds: list[float], lines: dict[int, list[int]]) -> TestFile:
    tests = [f"{path}::{number}" for number in range(len(seconds))]
    return TestFile(path, "", text, tests, seconds, {"glm_jax/data/rows/m.py": lines})


FILES = [
    on_clean("test_m.py", "", [4.0, 1.0, 2.0], {2: [IMPORTED], 4: [IMPORTED], 7: [0, 1], 10: [2], 14: [1]}),
    on_clean("test_far.py", "", [0.1], {2: [IMPORTED], 4: [IMPORTED], 7: [0], 15: [0]}),
    on_clean("test_none.py", "from glm_jax.data.rows import m", [1.0, 1.0], {2: [IMPORTED]}),
    on_clean("test_processes.py", "import subprocess", [9.0], {}),
]


def plan(line: int) -> tuple[list[str], list[str], bool]:
    return mutants_tests.plan(
        Mutant("rows", "glm_jax/data/rows/m.py", "", 0, ((line, 0), (line, 1)), "", ""), MODULE, FILES
    )


def test_tests_that_run_the_line_come_first_the_cheapest_of_them_before_others() -> None:
    both = ["test_far.py::0", "test_m.py::1", "test_m.py::0"]
    assert plan(7) == (["test_far.py", "test_m.py"], both, True)
    assert plan(5) == (["test_far.py", "test_m.py"], both, True)  # runs at import, its effect is in the body
    assert plan(2) == (["test_far.py", "test_m.py", "test_none.py"], both, True)  # so does a constant
    assert plan(11) == (["test_m.py"], ["test_m.py::2"], True)  # the first line counts for the whole statement
    assert plan(14) == (["test_m.py"], ["test_m.py::1"], True)  # the head of an `if` counts only for itself
    assert plan(1) == (["test_m.py", "test_processes.py"], [], False)
