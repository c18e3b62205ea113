"""The style of all figures: one set of colours, one axis style, the same bytes for the same data.

Figures are matplotlib objects made without pyplot, so that drawing leaves no state behind.
"""

from __future__ import annotations

import contextlib
import io
import math
import re
import warnings

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from matplotlib.typing import ColorType

# Okabe and Ito's colours, which colour-blind readers can tell apart. INK takes the place of black; yellow is last, as
# it is pale on white.
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#f0e442")
INK = "#262626"  # lines of totals, text and axes; `svg` turns it into the colour of the text around the figure
MAP = "cividis"  # of heat maps; reads the same to colour-blind readers and in grey


def _settings() -> contextlib.AbstractContextManager[None]:
    """Apply matplotlib's settings for all figures."""
    return matplotlib.rc_context({
        "font.family": "sans-serif",
        "font.size": 9.0,
        "text.parse_math": False,  # names of sources may hold a dollar
        "svg.fonttype": "none",
        "svg.hashsalt": "glm_jax",
        "text.color": INK,
        "axes.edgecolor": INK,
        "axes.labelcolor": INK,
        "xtick.color": INK,
        "ytick.color": INK,
    })  # fmt: skip


def figure(rows: int, columns: int, width: float = 5.6, height: float = 2.6) -> tuple[Figure, list[Axes]]:
    """Return a transparent figure and its axes, row by row; `width` and `height` are those of one axis, in inches."""
    with _settings():
        made = Figure(figsize=(columns * width, rows * height), layout="constrained", facecolor="none")
        axes = [made.add_subplot(rows, columns, place + 1) for place in range(rows * columns)]
    for axis in axes:
        axis.set_facecolor("none")
        axis.set_prop_cycle(color=COLOURS)
    return made, axes


def finish(axis: Axes, x: str = "", y: str = "", title: str = "", legend: bool = True) -> None:
    """Label an axis, remove its box, and add a legend if `legend` is set and any line has a label."""
    with _settings():
        axis.set_xlabel(x)
        axis.set_ylabel(y)
        axis.set_title(title, loc="left", fontsize=10, fontweight="bold")
        axis.spines[["top", "right"]].set_visible(False)
        axis.grid(visible=True, which="major", color=INK, alpha=0.12, linewidth=0.6)
        axis.set_axisbelow(True)
        handles, labels = axis.get_legend_handles_labels()
        if legend and handles:
            columns = min(4, -(-len(labels) // 4))
            axis.legend(handles, labels, frameon=False, fontsize=8, ncols=columns, handlelength=1.4)


def contrast(shade: ColorType) -> str:
    """Return black or white, whichever is easier to read on a colour."""
    red, green, blue = to_rgb(shade)
    return "white" if 0.3 * red + 0.6 * green + 0.1 * blue < 0.5 else "black"


def scale_values(axis: Axes, log: bool = False) -> None:
    """Write the numbers of the y axis in plain digits; with `log`, make it logarithmic if values span over fourfold.

    Call it when everything is plotted.
    """
    low, high = axis.dataLim.intervaly
    if log and low > 0 and 4 * low < high:
        axis.set_yscale("log")
        axis.yaxis.set_major_locator(LogLocator(subs=_subdivisions(low, high)))
        axis.yaxis.set_minor_formatter(NullFormatter())
    axis.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))


def _subdivisions(low: float, high: float) -> tuple[float, ...]:
    """Return the fewest parts of a decade that give a logarithmic axis at least three ticks."""
    chosen: tuple[float, ...] = ()
    for chosen in ((1.0,), (1.0, 3.0), (1.0, 2.0, 5.0), tuple(map(float, range(1, 10)))):
        decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        if sum(low <= part * 10.0**decade <= high for decade in decades for part in chosen) >= 3:
            break
    return chosen


def svg(drawn: Figure) -> str:
    """Return a figure as an <svg> element for a page; its text and axes have the colour of the page's text."""
    text = _save(drawn, "svg").decode("utf-8")
    # Remove what only a separate file needs: the prologue, the metadata, the addresses of XML namespaces.
    text = re.sub(r"^.*?(?=<svg)|<metadata>.*?</metadata>\s*|<style.*?</style>", "", text, flags=re.DOTALL)
    return re.sub(r' xmlns(:\w+)?="[^"]*"', "", text).replace(INK, "currentColor")


def png(drawn: Figure, dots_per_inch: int = 110) -> bytes:
    """Return a figure as a PNG file on a white background."""
    return _save(drawn, "png", "white", dots_per_inch)


def _save(drawn: Figure, kind: str, background: str = "auto", dots_per_inch: int | str = "figure") -> bytes:
    file = io.BytesIO()
    nameless = {"svg": {"Date": None, "Creator": None}, "png": {"Software": None}}[kind]
    with _settings(), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from font")  # a source's name in another script
        drawn.savefig(file, format=kind, metadata=nameless, facecolor=background, dpi=dots_per_inch)
    return file.getvalue()
