import math
from collections import Counter
from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex

from glm_jax.figures import mesh as figures_mesh
from glm_jax.figures import style
from glm_jax.model import GLMConfig
from glm_jax.parallel.mesh import AXES
from glm_jax.parallel.pipeline import schedule

SMALL = GLMConfig(4, 64, 4, 128, 256)
LARGE = GLMConfig(70, 12288, 96, 32768, 150528)
PATHS = ["embedding/word", "blocks/attention/qkv/kernel", "final_norm/scale"]


def axes(figure) -> list[Any]:
    return figure.axes


def sizes(data, pipeline, tensor):
    return {"data": data, "pipeline": pipeline, "tensor": tensor}


@pytest.mark.parametrize("kind", ["weights", "state"])
@pytest.mark.parametrize("path", [*PATHS, "blocks/feedforward/down/kernel", "blocks/attention/qkv/bias"])
def test_parts_are_of_jaxs_size_and_cover_each_array_evenly(path, kind):
    mesh = sizes(2, 2, 4)
    layout = figures_mesh.layouts(SMALL, mesh)[path]
    spec = getattr(layout, kind)
    owners = np.zeros(layout.shape, int)
    for device in figures_mesh.devices(mesh):
        part = figures_mesh.held(layout.shape, spec, mesh, device)
        owners[part] += 1
        abstract = jax.sharding.AbstractMesh(tuple(mesh.values()), AXES)
        shape = jax.NamedSharding(abstract, spec).shard_shape(layout.shape)
        assert tuple(each.stop - each.start for each in part) == shape
    split = math.prod(mesh[axis] for axis in AXES if axis in str(spec))
    assert (owners == 16 // split).all()


def test_a_dimension_over_two_axes_counts_the_first_as_the_outer():
    part = figures_mesh.held((16, 3), jax.P(("pipeline", "tensor")), sizes(1, 2, 4), sizes(0, 1, 2))
    assert part == (slice(12, 14), slice(0, 3))


def test_boxes_tile_the_square():
    mesh = sizes(2, 2, 4)
    layout = figures_mesh.layouts(SMALL, mesh)["blocks/attention/qkv/kernel"]
    boxes = {figures_mesh.box(layout.shape, layout.state, mesh, device) for device in figures_mesh.devices(mesh)}
    assert len(boxes) == 16 and sum(width * height for *_, width, height in boxes) == pytest.approx(1)
    # the first layers are at the top, tensor member 1 begins at a quarter, data member 1 in its middle
    assert figures_mesh.box(layout.shape, layout.state, mesh, sizes(1, 0, 1)) == (0.375, 0.5, 0.125, 0.5)


def test_the_partition_figure_marks_what_one_device_holds():
    figure = figures_mesh.partition_figure(SMALL, sizes(2, 2, 2), PATHS, sizes(1, 0, 1), "Parts")
    weights, state = axes(figure)[1], axes(figure)[4]
    assert len(weights.patches) == 4 + 1 and len(state.patches) == 8 + 1  # parts and the mark
    assert [text.get_text() for text in weights.texts] == ["p0 t0", "p0 t1", "p1 t0", "p1 t1"]
    mark = weights.patches[-1]
    assert (mark.get_x(), mark.get_y(), mark.get_width(), mark.get_height()) == (0.5, 0.5, 0.5, 0.5)
    assert to_hex(mark.get_edgecolor()) == figures_mesh.MARK
    assert weights.get_xlabel() == "heads 4 over tensor\ncopies along data"
    assert weights.get_ylabel() == "layers 4 over pipeline"
    assert state.get_xlabel() == "hidden 64 over data\nheads 4 over tensor"
    assert axes(figure)[2].texts[0].get_text() == "whole"
    assert axes(figure)[0].get_title() == "embedding\nword" and axes(figure)[0].get_ylabel().startswith("weights")
    assert [text.get_text() for text in figure.legends[0].texts] == ["held by device (data 1, pipeline 0, tensor 1)"]


def test_padding_is_hatched_where_stages_are_uneven():
    figure = figures_mesh.partition_figure(LARGE, sizes(24, 8, 4), PATHS, sizes(0, 0, 0), "GLM-130B")
    hatched = [patch for patch in axes(figure)[1].patches if patch.get_hatch()]
    assert [patch.get_height() for patch in hatched] == [pytest.approx(2 / 72)]
    assert not [patch for patch in axes(figure)[0].patches if patch.get_hatch()]
    assert len(axes(figure)[4].patches) == 768 + 2
    assert figure.legends[0].texts[1].get_text() == "padding, no layers"


def test_bytes_of_glm_130b_are_those_of_the_arithmetic():
    whole = figures_mesh.bytes_a_device(LARGE, sizes(1, 1, 1))
    assert whole == {
        "state": 12 * 128_697_794_560,
        "weights": 2 * 128_697_794_560,
        "gradient sums": 4 * 128_697_794_560,
    }
    shared = figures_mesh.bytes_a_device(LARGE, sizes(24, 8, 4))
    assert {kind: round(size / 1e9, 2) for kind, size in shared.items()} == {
        "state": 2.07,
        "weights": 8.27,
        "gradient sums": 16.54,
    }


def test_the_bytes_figure_has_a_row_a_mesh():
    meshes = [sizes(1, 1, 1), sizes(24, 8, 4)]
    (axis,) = axes(figures_mesh.bytes_figure(LARGE, meshes, 40, "Bytes"))
    assert [label.get_text() for label in axis.get_yticklabels()] == ["1 x 1 x 1", "24 x 8 x 4"]
    lines = {line.get_label(): line.get_xdata() for line in axis.lines}
    assert list(lines) == [*figures_mesh.KINDS, "sum", "40 GB"] and list(lines["40 GB"]) == [40, 40]
    np.testing.assert_allclose(lines["sum"], np.sum([lines[kind] for kind in figures_mesh.KINDS], axis=0))
    assert axis.get_xlabel() == "GB a device" and axis.get_xscale() == "log"


def test_the_timeline_draws_every_slot_of_the_table():
    tables = [schedule.build(name, 3, 5) for name in ("1f1b", "gpipe")]
    figure = figures_mesh.timeline(tables, "Two schedules")
    for axis, table in zip(axes(figure), tables, strict=True):
        busy = [bar for bar in axis.patches if to_hex(bar.get_facecolor(), keep_alpha=True) != figures_mesh.IDLE]
        counts = Counter((to_hex(bar.get_facecolor()), bar.get_width()) for bar in busy)
        assert counts == {(style.COLOURS[0], 1): 15, (style.COLOURS[5], 2): 15}
        assert sum(bar.get_width() for bar in axis.patches) == 3 * table.makespan(1, 2)
        assert axis.get_xlim() == (0, table.makespan(1, 2))
        assert Counter(text.get_text() for text in axis.texts) == dict.fromkeys("01234", 6)
        assert table.name in axis.get_title(loc="left") and axis.get_ylabel() == "stage"
    assert axes(figure)[-1].get_xlabel() == "time, in forward slots"


def test_stash_and_bubble_are_read_off_the_tables():
    figure = figures_mesh.stash_and_bubble(8, [1, 15, 176], 176, "Costs")
    idle, stash = axes(figure)
    for line in idle.lines[:2]:
        np.testing.assert_allclose(line.get_ydata(), [700 / 8, 700 / 22, 700 / 183])
    assert {line.get_label(): list(line.get_ydata()) for line in stash.lines[:2]} == {
        "gpipe": [1, 15, 176],
        "1f1b": [1, 15, 15],
    }
    assert idle.get_ylabel() == "idle time, %" and "M (8 stages)" in idle.get_xlabel()
    assert stash.lines[2].get_label() == "M = 176"
