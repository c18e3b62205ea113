from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from glm_jax.figures import depth as figures_depth
from glm_jax.figures import style
from glm_jax.figures.diagnostics import Scales


def scales(depth, factor=1.0):
    """Return the scales of two seeds, the second twice the first; the stream grows along the depth."""
    along = np.arange(1, 2 * depth + 2, dtype=np.float32) * factor
    pair = np.stack([along, 2 * along])
    return Scales(
        pair, pair[:, 1:], pair[:, 1:], 4 * pair[:, 1:], {"kernels": pair[:, :depth]}, {"kernels": pair[:, 0]}
    )


MEASURED = {"pre": {4: scales(4), 16: scales(16)}, "post": {4: scales(4, 10), 16: scales(16, 10)}}


def axes(figure) -> list[Any]:
    return figure.axes


def test_profiles_draw_a_line_a_depth_on_panels_of_one_scale():
    figure = figures_depth.profiles(MEASURED, lambda scales: scales.stream, "rms", "What norms read")
    pre, post = axes(figure)
    assert [pre.get_title(loc="left"), post.get_title(loc="left")] == ["pre", "post"]
    assert figure.get_suptitle() == "What norms read"
    assert [line.get_label() for line in pre.lines] == ["4 layers", "16 layers"]
    assert [text.get_text() for text in figure.legends[0].texts] == ["4 layers", "16 layers"]
    line = pre.lines[1]
    np.testing.assert_allclose(line.get_xdata(), np.linspace(0, 1, 33))
    np.testing.assert_allclose(line.get_ydata(), 1.5 * np.arange(1, 34))  # the median of the two seeds
    band = pre.collections[1].get_paths()[0].vertices
    assert band[:, 1].min() == 1 and band[:, 1].max() == 66
    assert pre.get_yscale() == "log" and pre.get_ylim() == post.get_ylim() and pre.get_xlim() == (0, 1)
    assert pre.get_ylabel() == "rms" and "0 bottom" in pre.get_xlabel()


def test_quantities_are_drawn_against_depth_a_colour_a_scheme():
    figure = figures_depth.against_depth(
        MEASURED, {"Stream": (lambda scales: scales.stream[:, -1], "rms of it")}, "Summary"
    )
    (axis,) = axes(figure)
    assert [line.get_label() for line in axis.lines] == ["pre", "post"]
    assert [to_hex(line.get_color()) for line in axis.lines] == list(style.COLOURS[:2])
    assert axis.lines[0].get_marker() != axis.lines[1].get_marker()  # different without colours, too
    np.testing.assert_array_equal(axis.lines[0].get_xdata(), [4, 16])
    np.testing.assert_allclose(axis.lines[1].get_ydata(), [135, 495])
    assert (axis.get_xscale(), axis.get_yscale()) == ("log", "log")
    assert (axis.get_xlabel(), axis.get_ylabel(), axis.get_title(loc="left")) == ("layers", "rms of it", "Stream")


def test_what_is_not_a_finite_positive_number_is_left_out():
    broken = scales(4)
    broken.stream[0, -1] = np.inf
    measured = {"pre": {4: broken, 16: scales(16)}}
    figure = figures_depth.against_depth(measured, {"Stream": (lambda scales: scales.stream[:, -1], "rms")}, "")
    np.testing.assert_allclose(axes(figure)[0].lines[0].get_ydata(), [np.nan, 49.5])


def test_a_share_is_branch_over_residual():
    np.testing.assert_allclose(figures_depth.share(scales(4)), 0.25)


@pytest.mark.parametrize(
    ("value", "label"), [(1e-5, "10⁻⁵"), (2e-5, "2×10⁻⁵"), (0.05, "0.05"), (1, "1"), (2000, "2,000"), (1e12, "10¹²")]
)
def test_ticks_read_without_mathematics(value, label):
    assert figures_depth.tick(value) == label


def test_a_logarithmic_axis_shows_its_decades():
    figure = figures_depth.against_depth(MEASURED, {"Stream": (lambda scales: scales.stream[:, -1], "rms")}, "")
    style.png(figure)
    labels = [label.get_text() for label in axes(figure)[0].get_yticklabels()]
    assert "100" in labels and not any("$" in label for label in labels)


def test_a_table_has_medians_and_exponents():
    measured = {"pre": MEASURED["pre"], "post": {4: scales(4, np.inf), 16: scales(16)}}
    lines = figures_depth.table(measured, lambda scales: scales.stream[:, -1]).splitlines()
    assert lines[0] == "layers | pre | post" and lines[1] == "---:|---:|---:|"
    assert lines[2] == "4 | 14 | –" and lines[3] == "16 | 50 | 50"
    assert lines[4] == f"exponent | {np.log(49.5 / 13.5) / np.log(4):+.2f} | –"


def test_panels_have_their_own_limits_when_asked():
    figure = figures_depth.profiles(MEASURED, lambda scales: scales.stream, "rms", "", shared=False)
    pre, post = axes(figure)
    assert post.get_ylim()[0] == pytest.approx(10 * pre.get_ylim()[0])


def test_an_axis_of_one_decade_has_ticks_between():
    measured = {"pre": {4: scales(4), 16: scales(16)}}
    figure = figures_depth.against_depth(measured, {"Stream": (lambda scales: scales.stream[:, -1], "rms")}, "")
    style.png(figure)
    labels = [label.get_text() for label in axes(figure)[0].get_yticklabels()]
    assert "20" in labels and "50" in labels
