"""Counts of a program that is given, by hand."""

import pytest

from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import buffers, counted

HEADER = f"""HloModule jit_step

FileNames
1 "{buffers.ROOT}/parallel/pipeline/stage.py"

FunctionNames
1 "Stage.forward.<locals>.block"
2 "when"
3 "blockwise"

FileLocations
1 {{file_name_id=1 function_name_id=1 line=1 end_line=1 column=1 end_column=1}}
2 {{file_name_id=1 function_name_id=2 line=2 end_line=2 column=1 end_column=1}}
3 {{file_name_id=1 function_name_id=3 line=3 end_line=3 column=1 end_column=1}}

StackFrames
1 {{file_location_id=1 parent_frame_id=1}}
2 {{file_location_id=2 parent_frame_id=1}}
3 {{file_location_id=3 parent_frame_id=1}}

"""
PRODUCT = "  %product = f32[8,6]{1,0} dot(%left, %right), lhs_contracting_dims={1}, rhs_contracting_dims={0}\n"


def computation(name: str, *lines: str, start: str = "") -> str:
    """Return a computation that takes a product of 8 x 4 and 4 x 6."""
    given = "  %left = f32[8,4]{1,0} parameter(0)\n  %right = f32[4,6]{1,0} parameter(1)\n"
    return f"{start}%{name} (left: f32[8,4], right: f32[4,6]) -> f32[8,6] {{\n{given}{''.join(lines)}{PRODUCT}}}\n\n"


def loop(name: str, frame: int, trips: int | None = None) -> str:
    """Return a loop over a computation."""
    known = f', backend_config={{"known_trip_count":{{"n":"{trips}"}}}}' if trips else ""
    metadata = f'metadata={{op_name="step" stack_frame_id={frame}}}'
    return f"  %of_{name} = f32[] while(%left), condition=%more, body=%{name}, {metadata}{known}\n"


MORE = "%more (x: f32[]) -> pred[] {\n  ROOT %x = pred[] parameter(0)\n}\n\n"
SENDS = "  %sum = f32[8,4]{1,0} all-reduce(%left), replica_groups=[4,2]<=[8], to_apply=%more\n"


def test_loops_of_slots_turn_as_often_as_the_schedule_gives_them_work() -> None:
    table, layers = schedule.build("1f1b", 2, 5), 3  # 7 ticks, at most 2 layers a stage
    text = HEADER + MORE
    text += computation("keys") + computation("queries", loop("keys", 3))
    again = SENDS.replace("%sum", "%sum.remat")
    text += computation("block", loop("queries", 3, 4), SENDS, again) + computation(
        "job", SENDS.replace("sum", "s.remat2")
    )
    text += computation("tick", loop("block", 1), loop("job", 2))
    text += computation("main", loop("tick", 0, table.ticks), start="ENTRY ")
    found = counted.count(text, (2, 2, 2), table, layers)
    runs = 1 + 7 + 5 * 2 + 5 + 5 * 2 * 4 + 5 * 2 * 4 * 4  # every query sees every key
    assert found.flops == pytest.approx(runs * 2 * 8 * 4 * 6)
    assert found.sent == pytest.approx({"tensor": (5 * 2 * 2 + 5) * 4 * 8 * 4})  # twice half of it
    assert found.repeated == pytest.approx(5 * 2 * 4 * 8 * 4)
