"""The curves of a run's report: which ones there are, and how to draw each on one axis."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Literal

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import LogNorm
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator, StrMethodFormatter

from glm_jax.evaluation import measures
from glm_jax.figures import style
from glm_jax.workdir.history import MARK_NAMES, Kind, Record, Series

POINTS = 800  # of a line at most
SMOOTHED_FROM = 300  # points; shorter lines are drawn as they are
COLUMNS = 240  # of a heat map
DEPTH_LINES = 5

# Colour and dashes of the vertical lines.
MARK_STYLES: dict[Kind, tuple[str, Literal["solid", "dashed", "dotted", "dashdot"]]] = {
    "intervention": (style.COLOURS[0], "dashed"),
    "spike": (style.COLOURS[1], "dotted"),
    "failure": (style.COLOURS[3], "dashdot"),
    "restart": ("#808080", "solid"),
}


@dataclasses.dataclass(frozen=True)
class Lines:
    """One panel of lines over steps, as data.

    `keys` name values of the events `event`, and may end in *; the first key found, if it has no slash, is the total,
    drawn in ink. A panel whose values are all `off` is left out.
    """

    title: str
    y: str
    keys: tuple[str, ...]
    event: str = "train"
    caption: str = ""
    log: bool = False
    smoothed: bool = False
    points: bool = False
    wide: bool = False
    scale: float = 1.0
    off: float | None = None


@dataclasses.dataclass(frozen=True)
class Panel:
    """One panel: a title, a caption, and a function that draws it on an axis."""

    title: str
    caption: str
    draw: Callable[[Axes], None]
    wide: bool = False
    constant: bool = False  # nothing in it ever changes


NATS = "nats a target token"
PANELS = (
    Lines("Training loss", NATS, ("loss", "loss/*"), caption="All, and by objective.", smoothed=True, wide=True),
    Lines("Held-out loss", NATS, ("loss", "loss/*"), "evaluation", "All, and by source.", points=True),
    Lines("Held-out bits per byte", "bits a byte", ("bits_per_byte/*",), "evaluation", "By source.", points=True),
    Lines("Learning rate", "learning rate", ("lr",)),
    Lines("Embedding gradient shrink", "alpha", ("embedding_shrink",), off=1.0),
    Lines("Batch", "rows a step", ("batch",)),
    Lines("Gradient norm", "norm", ("grad_norm", "grad_norm/embedding", "grad_norm/final_norm"),
          caption="Of all parameters, the embedding and the final norm; before clipping.", log=True, smoothed=True),
    Lines("Gradient norm by layers", "norm", ("grad_norm/blocks_*",), caption="By groups of layers.", log=True,
          smoothed=True),
    Lines("Parameter norm", "norm", ("param_norm",)),
    Lines("Update norm", "norm", ("update_norm",), log=True, smoothed=True),
    Lines("Loss scale", "scale", ("loss_scale",), log=True, off=1.0),
    Lines("Skipped steps", "steps since the start", ("skipped",), off=0.0,
          caption="Steps whose gradients were not finite; they changed only the loss scale."),
    Lines("Speed", "tokens a second", ("tokens_per_second",), smoothed=True),
    Lines("Utilisation", "% of the peak", ("mfu", "hfu", "mfu_formula", "hfu_formula"), scale=100.0, smoothed=True,
          caption="MFU counts the model's arithmetic, HFU also what the backward pass recomputes; by an exact "
          "count, and by the formula of GLM-130B's training code."),
    Lines("Waiting for data", "% of the time", ("data_wait",), scale=100.0, smoothed=True),
    Lines("Memory", "GiB", ("memory",), scale=1 / 2**30, caption="The most in use at once."),
    Lines("Checkpoints", "seconds", ("seconds", "blocked_seconds"), "checkpoint", points=True,
          caption="The time that a save took, and how much of it training waited."),
)  # fmt: skip
HELD_OUT = 3  # panels up to those of the held-out loss, which tasks follow


def panels(record: Record) -> list[Panel]:
    """Return the panels for which the record has data, in the order of a report."""
    found: list[Panel] = []
    for lines in [*PANELS[:HELD_OUT], *_task_lines(record), *PANELS[HELD_OUT:]]:
        series = _find(record, lines)
        if series:
            caption = lines.caption + _smoothing_caption(lines, series)
            draw, constant = _lines_drawer(record, lines, series), all(map(_is_constant, series.values()))
            found.append(Panel(lines.title, caption.strip(), draw, lines.wide, constant))
        if lines.title == "Update norm":  # activations come with the norms
            found += _depth_panels(record)
    return found


def _task_lines(record: Record) -> list[Lines]:
    """Return a panel for each measure of the tasks that were done during training."""
    percent = {measures.event_name(name) for name, measure in measures.MEASURES.items() if measure.percent}
    found = dict.fromkeys(name.partition("/")[0] for name in record.names("tasks", "*/*"))
    return [
        Lines(f"Tasks: {(shown := name.replace('_', ' '))}", "%" if name in percent else shown, (f"{name}/*",), "tasks",
              "By task.", points=True)
        for name in found
    ]  # fmt: skip


def smoothing_span(count: int) -> int:
    """Return over about how many points a line of `count` points is smoothed; 1 disables."""
    return count // 100 if count >= SMOOTHED_FROM else 1


def smooth(values: np.ndarray, span: int) -> np.ndarray:
    """Return an exponential moving average of values [n] over about `span` points, unbiased at the start; NaN stays."""
    keep, total, weight = 1 - 1 / span, 0.0, 0.0
    smoothed = np.full(len(values), np.nan)  # [n]
    for place, value in enumerate(values):
        if not np.isnan(value):
            total, weight = keep * total + value, keep * weight + 1
            smoothed[place] = total / weight
    return smoothed


def thin(values: np.ndarray, most: int = POINTS) -> np.ndarray:
    """Return at most `most` places of values [n]: the first, the last, and each part's lowest and highest."""
    if len(values) <= most:
        return np.arange(len(values))
    edges = np.linspace(0, len(values), (most - 2) // 2 + 1).astype(int)
    chosen = {0, len(values) - 1}
    for start, end in zip(edges[:-1], edges[1:], strict=True):
        stretch = values[start:end]
        if not np.isnan(stretch).all():
            chosen |= {start + int(np.nanargmin(stretch)), start + int(np.nanargmax(stretch))}
    return np.array(sorted(chosen))


def draw_marks(axis: Axes, record: Record) -> None:
    """Draw a vertical line at each mark, with its number at the top."""
    for mark in record.marks:
        colour, dashes = MARK_STYLES[mark.kind]
        axis.axvline(mark.step, color=colour, linestyle=dashes, linewidth=0.9, zorder=1.5)
        axis.annotate(
            str(mark.number),
            (mark.step, 1.0),
            (1.5, -1.0),
            xycoords=axis.get_xaxis_transform(),
            textcoords="offset points",
            fontsize=6,
            color=colour,
            va="top",
        )


def mark_keys(record: Record) -> list[Line2D]:
    """Return a labelled line for each kind of mark that the record has, for a legend."""
    return [
        Line2D([], [], color=MARK_STYLES[kind][0], linestyle=MARK_STYLES[kind][1], label=MARK_NAMES[kind])
        for kind in record.kinds()
    ]


def _find(record: Record, lines: Lines) -> dict[str, Series]:
    found: dict[str, Series] = {}
    for pattern in lines.keys:
        for name in record.names(lines.event, pattern):
            series = record.series(lines.event, name)
            if series is not None:
                found[name] = series
    values = [value for series in found.values() for value in series.values]
    if lines.off is not None and all(value == lines.off for value in values):
        return {}
    return found


def _is_constant(series: Series) -> bool:
    """Whether a series has several values, all equal."""
    return len(series.values) > 1 and bool((series.values == series.values[0]).all())


def _smoothing_caption(lines: Lines, series: dict[str, Series]) -> str:
    count = max(len(one.steps) for one in series.values())
    span = smoothing_span(count)
    if lines.smoothed and span > 1:
        return f" Faint: as logged; strong: the moving average of about {span:,} logged steps."
    return ""


def _lines_drawer(record: Record, lines: Lines, found: dict[str, Series]) -> Callable[[Axes], None]:
    def draw(axis: Axes) -> None:
        colours = iter(style.COLOURS * 4)
        total = next(iter(found))
        for name, series in found.items():
            colour = style.INK if name == total and "/" not in name else next(colours)
            _draw_line(axis, lines, series, _label(name, lines, len(found)), colour)
        draw_marks(axis, record)
        style.scale_values(axis, log=lines.log)
        _finish_steps(axis, record, lines.y, lines.title)

    return draw


def _label(name: str, lines: Lines, count: int) -> str:
    """Return the name of a line in the legend; a single line needs none."""
    if count == 1 and "/" not in name:
        return ""
    head, slash, rest = name.partition("/")
    if not slash:
        return {"loss": "all", "grad_norm": "all"}.get(name, name.replace("_", " "))
    if rest.startswith("blocks_"):
        return "layers " + rest.removeprefix("blocks_").replace("_", "–")
    return rest.replace("_", " ") if head == "grad_norm" else rest


def _draw_line(axis: Axes, lines: Lines, series: Series, label: str, colour: str) -> None:
    values = series.values * lines.scale
    if lines.log:
        values = np.where(values > 0, values, np.nan)
    span = smoothing_span(len(values)) if lines.smoothed else 1
    places = thin(values)
    if span > 1:
        axis.plot(series.steps[places], values[places], color=colour, alpha=0.25, linewidth=0.7)
        values = smooth(values, span)
        places = thin(values, POINTS // 2)
    marker = "o" if lines.points and len(places) <= 40 else ""
    axis.plot(
        series.steps[places], values[places], marker=marker, color=colour, label=label, linewidth=1.5,
        markersize=3,
    )  # fmt: skip


def _finish_steps(axis: Axes, record: Record, y: str, title: str, legend: bool = True) -> None:
    """Label an axis over steps, and give it the range of the whole record, so that all axes line up."""
    first, last = record.first_step, record.last_step
    pad = 0.01 * max(last - first, 1)
    axis.set_xlim(first - pad, last + pad)
    axis.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    style.finish(axis, "step", y, title, legend)


def _depth_panels(record: Record) -> list[Panel]:
    """Return panels of the activations: a heat map over steps and depth, and lines over depth at a few steps."""
    found = record.layers("activation_rms")
    if found is None:
        return []
    steps, values = found  # [n], [n, L]

    values = np.where(values > 0, values, np.nan)  # for the logarithm

    def draw_map(axis: Axes) -> None:
        columns, edges = bin_steps(steps, values)
        image = axis.imshow(
            columns.T, norm=LogNorm(), cmap=style.MAP, origin="lower", aspect="auto", interpolation="nearest",
            extent=(edges[0], edges[-1], -0.5, values.shape[1] - 0.5),
        )  # fmt: skip
        figure = axis.get_figure()
        assert figure is not None
        bar = figure.colorbar(image, ax=axis, pad=0.01, label="rms")
        bar.ax.yaxis.set_major_formatter(StrMethodFormatter("{x:,g}"))
        bar.ax.yaxis.set_minor_formatter(StrMethodFormatter("{x:,g}"))
        bar.ax.tick_params(which="both", colors=style.INK)
        bar.outline.set_visible(False)  # pyright: ignore[reportCallIssue, reportAttributeAccessIssue]
        draw_marks(axis, record)
        axis.yaxis.set_major_locator(MaxNLocator(integer=True))
        _finish_steps(axis, record, "layer", "Activation scale by layer", legend=False)

    def draw_depth(axis: Axes) -> None:
        chosen = np.unique(np.linspace(0, len(steps) - 1, DEPTH_LINES).round().astype(int))
        colours = matplotlib.colormaps[style.MAP](np.linspace(0.25, 0.9, len(chosen)))
        for place, colour in zip(chosen, colours, strict=True):
            axis.plot(values[place], ".-", color=colour, label=f"step {steps[place]:,}", linewidth=1.3, markersize=4)
        style.scale_values(axis, log=True)
        axis.xaxis.set_major_locator(MaxNLocator(integer=True))
        style.finish(axis, "layer", "rms", "Activation scale against depth")

    rms = "The root mean square of the residual stream after each layer"
    return [
        Panel("Activation scale by layer", f"{rms}, over steps.", draw_map),
        Panel("Activation scale against depth", f"{rms}, at a few steps.", draw_depth),
    ]


def bin_steps(steps: np.ndarray, values: np.ndarray, most: int = COLUMNS) -> tuple[np.ndarray, np.ndarray]:
    """Average values [n, L] over equal parts of steps [n]; return [columns, L] and edges [columns + 1].

    A part without a logged step repeats the part before it.
    """
    columns = min(most, len(steps))
    edges = np.linspace(steps[0], max(steps[-1], steps[0] + 1), columns + 1)  # [columns + 1]
    places = np.clip(np.searchsorted(edges, steps, side="right") - 1, 0, columns - 1)  # [n]
    known = np.isfinite(values)  # [n, L]
    sums, counts = np.zeros((2, columns, values.shape[1]))  # [columns, L]
    np.add.at(sums, places, np.where(known, values, 0.0))
    np.add.at(counts, places, known)
    averages = np.where(counts > 0, sums / np.maximum(counts, 1), np.nan)
    for column in range(1, columns):
        if not (places == column).any():
            averages[column] = averages[column - 1]
    return averages, edges
