"""The reader of compiled programs, on a module written by hand."""

import pytest

from glm_jax.planning import hlo
from glm_jax.planning.hlo import Collective

# data=2, pipeline=2, tensor=2: a loop of 5 trips holds one of unknown trips, and both hold collectives
MODULE = """HloModule jit_step, is_scheduled=true, entry_computation_layout={(f32[8]{0})->f32[8]{0}}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%inner (c: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %c = (s32[], bf16[4,8]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[] get-tuple-element(%c), index=0
  %x = bf16[4,8]{1,0:T(8,128)(2,1)} get-tuple-element(%c), index=1
  %whole = bf16[8,8]{1,0} all-gather(%x), replica_groups=[4,2]<=[8], dimensions={0}, use_global_device_ids=true
  %part = bf16[4,8]{1,0} reduce-scatter(%whole), replica_groups={{0,1},{2,3},{4,5},{6,7}}, dimensions={0}, to_apply=%add
  ROOT %next = (s32[], /*index=1*/bf16[4,8]{1,0}) tuple(%i, %part)
}

%more (d: (s32[], bf16[4,8])) -> pred[] {
  %d = (s32[], bf16[4,8]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

%outer (e: (s32[], bf16[4,8])) -> (s32[], bf16[4,8]) {
  %e = (s32[], bf16[4,8]{1,0}) parameter(0)
  %loop = (s32[], bf16[4,8]{1,0}) while(%e), condition=%more, body=%inner, metadata={op_name="jit(step)/while"}
  %y = bf16[4,8]{1,0} get-tuple-element(%loop), index=1
  %start = (bf16[4,8]{1,0}, bf16[4,8]{1,0}) collective-permute-start(%y), source_target_pairs={{0,2},{2,0},{1,3},{3,1}}
  %done = bf16[4,8]{1,0} collective-permute-done(%start)
  %j = s32[] get-tuple-element(%loop), index=0
  ROOT %last = (s32[], bf16[4,8]{1,0}) tuple(%j, %done)
}

ENTRY %main (p: f32[8], q: f32[2,2]) -> f32[8] {
  %p = f32[8]{0} parameter(0), metadata={op_name="state (of a test)"}
  %q = f32[2,2]{1,0} parameter(1)
  %begin = (s32[], bf16[4,8]{1,0}) constant(0)
  %ticks = (s32[], bf16[4,8]{1,0}) while(%begin), condition=%more, body=%outer, \
backend_config={"known_trip_count":{"n":"5"}}
  %both = (f32[8]{0}, f32[2,2]{1,0}) all-reduce(%p, %q), replica_groups=[4,2]<=[2,4]T(1,0), to_apply=%add
  %wide = (f32[8]{0}, f32[16]{0}) all-gather-start(%p), replica_groups=[4,2]<=[2,4]T(1,0), dimensions={0}
  %end = f32[16]{0} all-gather-done(%wide)
  ROOT %out = f32[8]{0} get-tuple-element(%both), index=0
}
"""


def test_collectives_have_their_axes_loops_and_bytes() -> None:
    assert set(hlo.collectives(MODULE, (2, 2, 2))) == {
        Collective("all-gather", "tensor", (5, None), 1, 8 * 8 * 2),  # what it returns
        Collective("reduce-scatter", "tensor", (5, None), 1, 8 * 8 * 2),  # what it takes
        Collective("collective-permute", "pipeline", (5,), 1, 4 * 8 * 2),
        Collective("all-reduce", "data", (), 1, (8 + 2 * 2) * 4),
        Collective("all-gather", "data", (), 1, 16 * 4),
    }


@pytest.mark.parametrize(
    "notation, axes",
    [
        ("replica_groups={{0,1},{2,3},{4,5},{6,7}}", "tensor"),
        ("source_target_pairs={{0,2},{2,0},{1,3},{3,1},{4,6},{6,4},{5,7},{7,5}}", "pipeline"),
        ("replica_groups=[2,4]<=[8]", "pipeline+tensor"),
        ("replica_groups=[4,2]<=[2,4]T(1,0)", "data"),
        ("replica_groups=mesh['axis_0'=2,'axis_1'=4] {'axis_0'}", "data"),
        ("replica_groups=mesh['axis_0'=4,'axis_1'=2], device_ids=([2,4]T(1,0)) {'axis_1'}", "data"),
        ("replica_groups={}", "data+pipeline+tensor"),
    ],
)
def test_axes_are_read_from_every_notation(notation: str, axes: str) -> None:
    assert hlo.axes_of(f"{notation}, channel_id=1", (2, 2, 2)) == axes


def test_a_notation_that_is_new_is_not_passed_over() -> None:
    with pytest.raises(ValueError, match="unknown notation of groups"):
        hlo.axes_of("replica_groups=everyone", (2, 2, 2))


@pytest.mark.parametrize(
    "shape, size",
    [
        ("f32[2,3]{1,0}", 24), ("bf16[8,128]{1,0:T(8,128)(2,1)}", 2048), ("pred[]", 1), ("s4[10]{0}", 5),
        ("f8e4m3fn[3]", 3), ("(f32[2]{0}, /*index=1*/u8[5]{0}, token[])", 13), ("c64[2]", 16),
    ],
)  # fmt: skip
def test_bytes_of_shapes(shape: str, size: int) -> None:
    assert hlo.shape_bytes(shape) == size


def test_trips_are_read_from_a_condition_that_has_them() -> None:
    annotated = "%more (d: (s32[], bf16[4,8])) -> pred[] {\n  %d = (s32[], bf16[4,8]{1,0}) parameter(0)\n"
    bounded = """  %k = s32[]{:T(128)} get-tuple-element(%d), index=0
  %seven = s32[]{:T(128)} constant(7)
  ROOT %less = pred[] compare(%k, %seven), direction=LT
"""
    text = MODULE.replace(f"{annotated}  ROOT %true = pred[] constant(true)\n", annotated + bounded)
    loops = {one.loops for one in hlo.collectives(text, (2, 2, 2)) if one.loops}
    assert loops == {(5, 7), (5,)}  # the compiler's word counts first
