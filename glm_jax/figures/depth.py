"""Figures of the measures of diagnostics.py: along the depth of a model, and against its number of layers."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import matplotlib
import numpy as np
from matplotlib.axis import XAxis, YAxis
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from glm_jax.figures import style
from glm_jax.figures.diagnostics import Scales, exponent

Measured = Mapping[str, Mapping[int, Scales[np.ndarray]]]  # by the name of a scheme, then by depth
Quantity = Callable[[Scales[np.ndarray]], np.ndarray]

MARKERS = "osD^vP"
_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_PLAIN = range(-2, 4)  # decades written without a power: 0.01 to 1,000


def tick(value: float, _place: int = 0) -> str:
    """Return the label of a tick on a logarithmic axis: 0.1, 2,000, 10⁵, 2×10⁻⁴."""
    power = int(np.floor(np.log10(value) + 1e-9))
    if power in _PLAIN:
        return f"{value:,.{max(0, -power)}f}"
    factor = round(value / 10**power)
    return ("" if factor == 1 else f"{factor}×") + "10" + str(power).translate(_SUPERSCRIPTS)


def logarithmic(axis: XAxis | YAxis) -> None:
    """Make an axis logarithmic, with labels that need no mathematical font. Call it when its limits are set."""
    axis.axes.set(**{f"{axis.axis_name}scale": "log"})
    low, high = axis.get_view_interval()
    within = (1, 2, 5) if np.log10(high / low) < 1.5 else (1,)
    axis.set_major_locator(LogLocator(subs=within, numticks=7))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(FuncFormatter(tick))


def share(scales: Scales[np.ndarray]) -> np.ndarray:
    """Return the size of each branch over the residual it is added to: [seeds, 2L]."""
    return scales.branch / scales.residual


def profiles(measured: Measured, quantity: Quantity, y: str, title: str, shared: bool = True) -> Figure:
    """Draw a quantity along the depth: a panel per scheme, a line per depth, medians and ranges over seeds.

    Args:
        measured: by scheme and depth.
        quantity: returns [seeds, places along the depth]; values that are not finite and above 0 are left out.
        y: the label, with the unit.
        title: of the figure.
        shared: whether all panels have the same limits.
    """
    made, axes = style.figure(1, len(measured), width=2.9, height=2.8)
    depths = sorted({depth for by_depth in measured.values() for depth in by_depth})
    colours = matplotlib.colormaps[style.MAP](np.linspace(0, 0.85, len(depths)))
    for axis, (scheme, by_depth) in zip(axes, measured.items(), strict=True):
        for depth, colour in zip(depths, colours, strict=True):
            if depth in by_depth:
                values = _positive(quantity(by_depth[depth]))  # [seeds, places]
                x = np.linspace(0, 1, values.shape[1])
                axis.plot(x, _median(values), color=colour, linewidth=1.4, label=f"{depth:,} layers")
                axis.fill_between(x, *_range(values), color=colour, alpha=0.25, linewidth=0)
        logarithmic(axis.yaxis)
        style.finish(axis, "place in the model (0 bottom, 1 top)", y if axis is axes[0] else "", scheme, legend=False)
    limits = [limit for axis in axes for limit in axis.get_ylim()]
    for axis in axes:
        axis.set(xlim=(0, 1), xticks=(0, 0.5, 1))
        if shared:
            axis.set_ylim(min(limits), max(limits))
            axis.label_outer(remove_inner_ticks=True)
        logarithmic(axis.yaxis)
    _name(made, *axes[0].get_legend_handles_labels(), title)
    return made


def against_depth(measured: Measured, quantities: Mapping[str, tuple[Quantity, str]], title: str) -> Figure:
    """Draw quantities against the number of layers: a panel each, a line per scheme, medians and ranges over seeds.

    Args:
        measured: by scheme and depth.
        quantities: by the panel's title: a function that returns [seeds], and the label of y with its unit. Values that
            are not finite and above 0 are left out.
        title: of the figure.
    """
    made, axes = style.figure(1, len(quantities), width=3.9, height=3.0)
    for axis, (name, (quantity, y)) in zip(axes, quantities.items(), strict=True):
        for (scheme, by_depth), colour, marker in zip(measured.items(), style.COLOURS, MARKERS, strict=False):
            depths = sorted(by_depth)
            values = _positive(np.stack([quantity(by_depth[depth]) for depth in depths], axis=1))  # [seeds, depths]
            axis.plot(depths, _median(values), color=colour, marker=marker, markersize=4, linewidth=1.4, label=scheme)
            axis.fill_between(depths, *_range(values), color=colour, alpha=0.2, linewidth=0)
        logarithmic(axis.xaxis)
        logarithmic(axis.yaxis)
        style.finish(axis, "layers", y, name, legend=False)
    _name(made, *axes[0].get_legend_handles_labels(), title)
    return made


def _name(made: Figure, handles: list, labels: list[str], title: str) -> None:
    """Put the title above the panels, and one legend of all of them below."""
    made.suptitle(title, fontsize=11, color=style.INK)
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)


def _positive(values: np.ndarray) -> np.ndarray:
    values = np.asarray(values, np.float64)
    return np.where(np.isfinite(values) & (values > 0), values, np.nan)


def _median(values: np.ndarray) -> np.ndarray:
    """Return the median over seeds [seeds, n] -> [n]; nan unless every seed has a value."""
    return np.median(values, axis=0)


def _range(values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    return np.min(values, axis=0), np.max(values, axis=0)


def table(measured: Measured, quantity: Quantity) -> str:
    """Return a quantity's medians over seeds as a Markdown table: a row per depth, a column per scheme.

    The last row is the exponent p of depth ** p fitted to each column. A value that is not finite and above 0 is shown
    as a dash, and its column has no exponent.
    """
    depths = sorted({depth for by_depth in measured.values() for depth in by_depth})
    columns = {}
    for scheme, by_depth in measured.items():
        columns[scheme] = [float(_median(_positive(quantity(by_depth[depth])))) for depth in depths]
    lines = ["layers | " + " | ".join(columns), "---:|" + "---:|" * len(columns)]
    for row, depth in enumerate(depths):
        lines.append(f"{depth:,} | " + " | ".join(_number(values[row]) for values in columns.values()))
    exponents = [exponent(depths, values) if np.isfinite(values).all() else np.nan for values in columns.values()]
    lines.append("exponent | " + " | ".join(f"{power:+.2f}" if np.isfinite(power) else "–" for power in exponents))
    return "\n".join(lines)


def _number(value: float) -> str:
    return f"{value:.2g}" if np.isfinite(value) else "–"
