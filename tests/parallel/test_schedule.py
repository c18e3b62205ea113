import dataclasses
from fractions import Fraction
from xml.etree import ElementTree

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from glm_jax.errors import UserError
from glm_jax.parallel.pipeline import drawing, schedule

NAMES = st.sampled_from(sorted(schedule.SCHEDULES))


@settings(max_examples=200, deadline=None)
@given(NAMES, st.integers(1, 8), st.integers(1, 64), st.integers(1, 5), st.integers(1, 5))
def test_bubble_is_that_of_pipedream_flush_whatever_a_slot_costs(name, stages, microbatches, forward, backward):
    table = schedule.build(name, stages, microbatches)
    expected = Fraction(stages - 1, microbatches + stages - 1)
    assert table.bubble == expected
    assert table.bubble_of(forward, backward) == expected


def test_bubble_for_every_size_of_the_paper():
    for stages in range(1, 9):
        for microbatches in range(1, 65):
            expected = Fraction(stages - 1, microbatches + stages - 1)
            assert schedule.build("1f1b", stages, microbatches).bubble == expected


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 8), st.integers(1, 64))
def test_1f1b_keeps_a_bounded_number_of_inputs_and_gpipe_keeps_all(stages, microbatches):
    bound = tuple(min(microbatches, 2 * (stages - 1 - stage) + 1) for stage in range(stages))
    assert schedule.build("1f1b", stages, microbatches).in_flight == bound
    assert schedule.build("gpipe", stages, microbatches).in_flight == (microbatches,) * stages


def test_1f1b_of_two_stages_by_hand():
    table = schedule.build("1f1b", 2, 3)
    assert table.forward == ((0, -1), (1, 0), (2, 1), (-1, 2), (-1, -1))
    assert table.backward == ((-1, -1), (-1, 0), (0, 1), (1, 2), (2, -1))
    assert table.ticks == 5 and table.ring == 3 and table.output_ring == 1


def test_gpipe_of_two_stages_by_hand():
    table = schedule.build("gpipe", 2, 2)
    assert table.forward == ((0, -1), (1, 0), (-1, 1), (-1, -1), (-1, -1), (-1, -1))
    assert table.backward == ((-1, -1), (-1, -1), (-1, -1), (-1, 0), (0, 1), (1, -1))
    assert table.ticks == 6 and table.ring == 2 and table.output_ring == 2
    assert table.makespan(3, 5) == 3 * 3 + 3 * 5


def broken(rows, tick, stage, microbatch):
    changed = [list(row) for row in rows]
    changed[tick][stage] = microbatch
    return tuple(map(tuple, changed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"forward": (1, 0, 0)}, "comes twice"),
        ({"forward": (1, 0, schedule.IDLE)}, "do not hold each"),
        ({"backward": (4, 0, 7)}, "do not hold each"),
    ],
)
def test_checker_finds_a_slot_that_is_wrong(changes, message):
    table = schedule.build("1f1b", 2, 3)
    wrong = {field: broken(getattr(table, field), *change) for field, change in changes.items()}
    with pytest.raises(ValueError, match=message):
        schedule.check(dataclasses.replace(table, **wrong))


def test_checker_demands_a_slot_for_each_waiting_input():
    table = schedule.build("1f1b", 3, 8)
    assert table.in_flight == (5, 3, 1) and table.output_ring == 1
    with pytest.raises(ValueError, match="microbatch 0 on stage 0 is written over by microbatch 4"):
        schedule.check(dataclasses.replace(table, ring=4))
    late = ((schedule.IDLE,) * 2, *(row[:2] for row in table.backward))  # the last stage's column stays, others wait
    columns = [(*first, last[2]) for first, last in zip(late, (*table.backward, (-1, -1, -1)), strict=True)]
    forward = (*table.forward, (-1, -1, -1))
    shifted = dataclasses.replace(table, forward=forward, backward=tuple(columns), ring=8)
    with pytest.raises(ValueError, match="backward of microbatch 0 on stage 1 is not one tick after that of stage 2"):
        schedule.check(shifted)


def test_checker_finds_broken_dependencies():
    table = schedule.build("gpipe", 3, 4)
    mirrored = dataclasses.replace(table, forward=tuple(row[::-1] for row in table.forward))
    with pytest.raises(ValueError, match="forward of microbatch 0 on stage 1 is not one tick after that of stage 0"):
        schedule.check(mirrored)
    mirrored = dataclasses.replace(table, backward=tuple(row[::-1] for row in table.backward))
    with pytest.raises(ValueError, match="backward of microbatch 0 on stage 0 is not one tick after that of stage 1"):
        schedule.check(mirrored)
    idle = ((schedule.IDLE,) * 3,) * 12
    early = dataclasses.replace(table, forward=idle + table.forward, backward=table.backward + idle)
    with pytest.raises(ValueError, match="comes before its forward"):
        schedule.check(early)


def test_checker_finds_a_stash_written_over():
    order = (
        2,
        0,
        1,
        3,
    )  # forward out of order: the microbatches in flight are not neighbours, so slots m % ring collide
    forward = tuple((microbatch,) for microbatch in order) + ((-1,),)
    backward = ((-1,), (2,), (0,), (1,), (3,))
    table = schedule.Schedule("out of order", 1, 4, forward, backward, ring=2)
    assert table.in_flight == (2,)
    with pytest.raises(ValueError, match="written over by microbatch 2"):
        schedule.check(table)


def test_unknown_names_and_empty_schedules_are_refused():
    with pytest.raises(UserError, match="pipeline.schedule is '2f2b', it must be one of 1f1b, gpipe"):
        schedule.build("2f2b", 2, 2)
    with pytest.raises(UserError, match="microbatches must be at least 1"):
        schedule.build("1f1b", 2, 0)


def test_ascii_timeline_by_hand():
    expected = """\
stage 0 F0 F1 .  F2 B0 .  B1 B2
stage 1 .  F0 B0 F1 B1 F2 B2 .

1f1b: 2 stages, 3 microbatches, 5 ticks, bubble 1/4 (25.0%), stash slots by stage 3, 1
"""
    assert drawing.ascii_timeline(schedule.build("1f1b", 2, 3)) == expected


def test_a_tick_is_as_long_as_its_busiest_stage_and_a_backward_slot_as_two_forward_ones():
    table = schedule.Schedule("one tick", 2, 1, ((0, schedule.IDLE),), ((schedule.IDLE, 0),), ring=1)
    assert table.makespan(1, 2) == 2 and table.makespan(5, 2) == 5
    assert table.bubble == 1 - Fraction(3, 2)


def test_ascii_timeline_breaks_into_panels_by_hand():
    text = drawing.ascii_timeline(schedule.build("1f1b", 2, 3), width=20)
    assert text.split("\n\n")[:2] == [
        "stage 0 F0 F1 .  F2\nstage 1 .  F0 B0 F1",
        "stage 0 B0 .  B1 B2\nstage 1 B1 F2 B2 .",
    ]
    assert drawing.ascii_timeline(schedule.build("1f1b", 1, 11), width=1).startswith("stage 0 F0\n\nstage 0 B0\n\n")
    ten, eleven = (drawing.ascii_timeline(schedule.build("gpipe", stages, 1)) for stages in (10, 11))
    assert ten.startswith("stage 0 F0 .") and eleven.startswith("stage 0  F0 .")  # as wide as the last stage needs
    assert "stage 0 F0  B0  F1  B1" in drawing.ascii_timeline(schedule.build("1f1b", 1, 11))  # a digit more


def test_svg_timeline_by_hand():
    """Two stages and one microbatch: F0 on stage 0, F0 and B0 on stage 1, B0 on stage 0."""
    table = schedule.build("1f1b", 2, 1)
    root = ElementTree.fromstring(drawing.svg_timeline(table))
    assert root.attrib == {"width": str(7 * len(drawing.summary(table))), "height": "66",
                           "font-family": "sans-serif"}  # fmt: skip
    space = "{http://www.w3.org/2000/svg}"
    rects = [
        tuple(rect.get(name) for name in ("x", "y", "width", "height", "fill")) for rect in root.iter(f"{space}rect")
    ]
    forward, backward, idle = "#4c78a8", "#f58518", "#eeeeee"
    assert rects == [
        ("64", "1", "13", "19", forward), ("64", "23", "13", "19", idle),
        ("78", "1", "13", "19", idle), ("78", "23", "13", "19", forward),
        ("92", "1", "27", "19", idle), ("92", "23", "27", "19", backward),
        ("120", "1", "27", "19", backward), ("120", "23", "27", "19", idle),
    ]  # fmt: skip
    texts = [(text.get("x"), text.get("y"), text.text) for text in root.iter(f"{space}text")]
    assert texts == [
        ("4", "15", "stage 0"), ("4", "37", "stage 1"), ("71", "14", "0"), ("85", "36", "0"), ("106", "36", "0"),
        ("134", "14", "0"), ("4", "60", drawing.summary(table)),
    ]  # fmt: skip
    wide = ElementTree.fromstring(drawing.svg_timeline(schedule.build("1f1b", 1, 30)))
    assert wide.get("width") == str(64 + 30 * 3 * 14 + 4)


@settings(max_examples=20, deadline=None)
@given(NAMES, st.integers(1, 8), st.integers(1, 16), st.integers(20, 200))
def test_timelines_show_every_job_once(name, stages, microbatches, width):
    table = schedule.build(name, stages, microbatches)
    text = drawing.ascii_timeline(table, width)
    cells = [cell for line in text.splitlines() if line.startswith("stage") for cell in line.split()[2:]]
    jobs = [f"{kind}{m}" for kind in "FB" for m in range(microbatches)] * stages
    assert sorted(cell for cell in cells if cell != ".") == sorted(jobs)
    assert max(map(len, text.splitlines()[:stages])) <= max(width, 20)
    root = ElementTree.fromstring(drawing.svg_timeline(table))
    fills = [shape.get("fill") for shape in root.iter("{http://www.w3.org/2000/svg}rect")]
    for colour in (drawing.FORWARD_COLOUR, drawing.BACKWARD_COLOUR):
        assert fills.count(colour) == stages * microbatches
