"""Figures and tables of trained sweeps: loss curves, final losses, the stability frontier.

Every function takes the results of `saved.Saved`, complete or not: a figure leaves out what is missing, and a table
says so.
"""

from __future__ import annotations

import contextlib
import itertools
import math
import statistics
from collections.abc import Mapping, Sequence

import matplotlib
import numpy as np
from matplotlib.artist import Artist
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from glm_jax.figures import style
from glm_jax.sweeps.frontier import frontier
from glm_jax.sweeps.paired import compare
from glm_jax.sweeps.results import Row, spread, table

MARKERS = "osD^vP"
DEPTH, SCHEME, RATE, SEED = "model.num_layers", "model.norm", "lr", "seed"  # axes of the sweep of layer norms
NATS = "loss, nats a target token"
NOTHING = "learnt nothing"  # as in verdict.py


def labels(results: Sequence[Row], axis: str) -> list[str]:
    """Return the labels of an axis that occur, in their order; numbers ascending."""
    found = list(dict.fromkeys(result["labels"][axis] for result in results))
    return sorted(found, key=float) if all(map(_is_number, found)) else found


def _is_number(label: str) -> bool:
    try:
        float(label)
    except ValueError:
        return False
    return True


def heldout(result: Row) -> float | None:
    """Return the held-out loss of a member; None if it diverged, or if nothing was held out."""
    return result["heldout"].get("loss") if result["status"] == "finished" else None


def where(results: Sequence[Row], chosen: Mapping[str, str]) -> list[Row]:
    """Return the results that have these labels."""
    return [result for result in results if all(result["labels"][axis] == label for axis, label in chosen.items())]


def loss_curves(results: Sequence[Row], lines: str, rows: str = "", columns: str = "", title: str = "") -> Figure:
    """Draw the moving average of every member's loss; a cross marks the step at which a member diverged.

    Args:
        lines: the axis whose labels have a colour each, or shades of one if they are numbers.
        rows, columns: axes whose labels have a row or a column of panels each, if any.
        title: of the figure.
    """
    down = labels(results, rows) if rows else [""]
    across = labels(results, columns) if columns else [""]
    made, axes = style.figure(len(down), len(across), *((2.9, 2.4) if columns else (5.8, 3.0)))
    names = labels(results, lines)
    colours = dict(zip(names, _colours(names), strict=True))
    low, high = _span(results)
    last = max(result["curves"]["loss_step"][-1] for result in results)
    for axis, (row, column) in zip(axes, itertools.product(down, across), strict=True):
        panel = {rows: row} if rows else {}
        panel |= {columns: column} if columns else {}
        for name in names:
            for number, result in enumerate(where(results, panel | {lines: name})):
                _curve(axis, result, colours[name], name if number == 0 else "_")
        _guess(axis, where(results, panel))
        axis.set(xlim=(0, last), ylim=(low, high))
        if not where(results, panel):
            axis.text(0.5, 0.5, "not yet", transform=axis.transAxes, ha="center", alpha=0.6, color=style.INK)
        told = ", ".join(part for part in (column, f"{row} layers" if rows == DEPTH else row) if part)
        style.finish(axis, "step", NATS, told, legend=False)
        if len(axes) > 1:
            axis.label_outer()
    legend(made, axes, title)
    return made


def _colours(names: Sequence[str]) -> list:
    """Return shades of one scale for numbers, distinct colours for names."""
    if all(map(_is_number, names)) and len(names) > 1:
        return list(matplotlib.colormaps[style.MAP](np.linspace(0, 0.9, len(names))))
    return list(itertools.islice(itertools.cycle(style.COLOURS), len(names)))


def _span(results: Sequence[Row]) -> tuple[float, float]:
    """Return limits that show all finite losses, up to one nat above a uniform guess."""
    losses = np.concatenate([result["curves"]["loss"] for result in results])
    ceiling = max(result["uniform"] for result in results) + 1
    losses = losses[np.isfinite(losses)]
    return float(losses.min()) - 0.1, float(min(losses.max(), ceiling)) + 0.1


def _curve(axis: Axes, result: Row, colour: object, label: str) -> None:
    steps, losses = result["curves"]["loss_step"], result["curves"]["loss"]
    diverged = result["status"] == "diverged"
    axis.plot(steps, losses, color=colour, linewidth=1.0, alpha=0.9, label=label, linestyle="--" if diverged else "-")
    if diverged and np.isfinite(losses).any():
        place = np.interp(result["step"], steps, losses)
        axis.plot([result["step"]], [place], "x", color=colour, markersize=4.5)


def _guess(axis: Axes, results: Sequence[Row]) -> None:
    """Mark the loss of guessing by frequency."""
    if results:
        unigram = statistics.fmean(result["unigram"] for result in results)
        axis.axhline(unigram, color=style.INK, linewidth=0.8, linestyle=":", label="guess by frequency")


def legend(made: Figure, axes: Sequence[Axes], title: str) -> None:
    """Put the title above the panels, and one legend of all of them below."""
    found: dict[str, Artist] = {}
    for axis in axes:
        for handle, label in zip(*axis.get_legend_handles_labels(), strict=True):
            if isinstance(handle, Line2D) and handle.get_linestyle() == "--":
                solid = {"color": handle.get_color(), "linewidth": handle.get_linewidth()}
                handle = Line2D([], [], **solid)  # dashes mean that a member diverged; they do not depend on its label
            found.setdefault(label, handle)
    last = found.pop("guess by frequency", None)
    if last is not None:
        found["guess by frequency"] = last
    if title:
        made.suptitle(title, fontsize=11, color=style.INK)
    made.legend(list(found.values()), list(found), loc="outside lower center", ncols=min(6, len(found)), frameon=False,
                fontsize=8)  # fmt: skip


def stability_frontier(results: Sequence[Row]) -> Figure:
    """Draw, for each depth and scheme, the highest rate up to which nothing diverged: a mark for each seed.

    A bar shows the uncertainty, between seeds and between points of the grid: it reaches from the lowest seed's rate to
    the first rate of the grid above the highest seed's. An arrow means that the grid ends before the scheme diverges.
    """
    found, rates = frontier(results), [float(rate) for rate in labels(results, RATE)]
    depths, schemes = labels(results, DEPTH), labels(results, SCHEME)
    none = rates[0] ** 2 / rates[1]  # the place of marks whose lowest rate diverged
    made, (axis,) = style.figure(1, 1, 6.4, 3.6)
    for place, scheme in enumerate(schemes):
        colour, marker = style.COLOURS[place], MARKERS[place]
        for x, depth in enumerate(depths):
            seeds = found.get((depth, scheme))
            if not seeds:
                continue
            here = x + 0.19 * (place - (len(schemes) - 1) / 2)
            values = [none if value is None else value for value in seeds.values()]
            above = [rate for rate in rates if rate > max(values)]
            axis.vlines(
                here, min(values), above[0] if above else rates[-1] * 1.6, color=colour, alpha=0.35, linewidth=3
            )
            if not above:
                axis.plot([here], [rates[-1] * 1.75], marker=r"$\uparrow$", color=colour, markersize=8)
            shifts = 0.04 * (np.arange(len(values)) - (len(values) - 1) / 2)
            axis.plot(here + shifts, values, marker, color=colour, markersize=5.5, markeredgecolor="white",
                      markeredgewidth=0.5, label=scheme if not _labelled(axis, scheme) else "_")  # fmt: skip
    axis.set_yscale("log")
    axis.set(xlim=(-0.6, len(depths) - 0.4), ylim=(none / 1.6, rates[-1] * 2.4))
    ticks = {none: "none", **{rate: f"{rate:g}" for rate in rates}}
    axis.yaxis.set_major_locator(FixedLocator(list(ticks)))
    axis.yaxis.set_minor_locator(NullLocator())
    axis.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _nearest(ticks, value)))
    axis.set_xticks(range(len(depths)), depths)
    style.finish(axis, "layers", "highest stable peak learning rate", legend=False)
    axis.grid(visible=False, axis="x")
    legend(made, [axis], "Stability frontier: a mark a seed")
    return made


def _nearest(ticks: Mapping[float, str], value: float) -> str:
    return ticks[min(ticks, key=lambda tick: abs(math.log(tick / value)))]


def _labelled(axis: Axes, label: str) -> bool:
    return label in axis.get_legend_handles_labels()[1]


def loss_against_rate(results: Sequence[Row]) -> Figure:
    """Draw held-out loss after the last step against the learning rate: a panel per depth, a mark per seed.

    Lines join the means over the seeds that finished. A diverged member is shown as a cross at the top.
    """
    depths, schemes = labels(results, DEPTH), labels(results, SCHEME)
    made, axes = style.figure(1, len(depths), 3.1 if len(depths) > 1 else 4.6, 3.1)
    known = [value for result in results if (value := heldout(result)) is not None]
    low, top = min(known, default=0.0), max(known, default=1.0)
    step = 0.04 * (top - low or 1.0)
    for axis, depth in zip(axes, depths, strict=True):
        for place, scheme in enumerate(schemes):
            mine = where(results, {DEPTH: depth, SCHEME: scheme})
            if mine:
                _losses_of_scheme(axis, mine, scheme, place, top + step * (1.5 + place))
        axis.set_xscale("log")
        rates = [float(rate) for rate in labels(results, RATE)]
        axis.xaxis.set_major_locator(FixedLocator(rates))
        axis.xaxis.set_minor_locator(NullLocator())
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        axis.tick_params(axis="x", labelrotation=45)
        axis.set_ylim(low - step, top + step * (2.5 + len(schemes)))
        style.finish(axis, "peak learning rate", f"held-out {NATS}", f"{depth} layers", legend=False)
        axis.label_outer()
    legend(made, axes, "Held-out loss; × diverged")
    return made


def _losses_of_scheme(axis: Axes, mine: Sequence[Row], scheme: str, place: int, height: float) -> None:
    colour, means = style.COLOURS[place], {}
    for rate in labels(mine, RATE):
        here = where(mine, {RATE: rate})
        losses = [value for result in here if (value := heldout(result)) is not None]
        x = float(rate) * 1.06 ** (place - 1.5)  # side by side
        axis.plot([x] * len(losses), losses, MARKERS[place], color=colour, markersize=3.2, alpha=0.75)
        diverged = [number for number, result in enumerate(here) if result["status"] == "diverged"]
        crosses = [x * 1.1 ** (number - (len(here) - 1) / 2) for number in diverged]
        axis.plot(crosses, [height] * len(crosses), "x", color=colour, markersize=4)
        if losses:
            means[x] = statistics.fmean(losses)
    axis.plot(list(means), list(means.values()), "-", marker=MARKERS[place], markersize=3.2, color=colour,
              linewidth=1.3, label=scheme)  # fmt: skip


def final_losses(results: Sequence[Row], axis: str, title: str = "") -> Figure:
    """Draw held-out loss after the last step by the labels of an axis: a mark per seed, a bar at the mean.

    A thin line joins members that share a seed, and so have the same batches.
    """
    made, (panel,) = style.figure(1, 1, 4.6, 3.0)
    names = labels(results, axis)
    for seed, marker in zip(labels(results, SEED), itertools.cycle(MARKERS), strict=False):
        of_seed = {result["labels"][axis]: heldout(result) for result in where(results, {SEED: seed})}
        values = [math.nan if (value := of_seed.get(name)) is None else value for name in names]
        panel.plot(range(len(names)), values, color=style.INK, alpha=0.3, linewidth=0.8)
        panel.plot(range(len(names)), values, marker, markersize=5, color=style.COLOURS[0], label=f"seed {seed}")
    for place, name in enumerate(names):
        losses = [value for result in where(results, {axis: name}) if (value := heldout(result)) is not None]
        if losses:
            panel.hlines(statistics.fmean(losses), place - 0.22, place + 0.22, color=style.COLOURS[1], linewidth=2)
    panel.set_xticks(range(len(names)), names)
    panel.set_xlim(-0.5, len(names) - 0.5)
    style.finish(panel, "", f"held-out {NATS}", title, legend=False)
    panel.grid(visible=False, axis="x")
    legend(made, [panel], "")
    return made


def paired_table(results: Sequence[Row], axis: str) -> str:
    """Return a table of held-out losses by the labels of an axis, with their differences from the first label.

    Losses are means over seeds with the spread of the sample. Differences are those of equal seeds, which have equal
    batches: see sweeps/paired.py. A difference of fewer than two pairs is left out.
    """
    first, *_ = names = labels(results, axis)
    lines = []
    for name in names:
        mine = where(results, {axis: name})
        losses = [value for result in mine if (value := heldout(result)) is not None]
        diverged, less = sum(result["status"] == "diverged" for result in mine), ""
        if name != first:
            with contextlib.suppress(ValueError):
                less = str(compare(results, axis, first, name, heldout))
        lines.append([name, str(len(losses)), str(diverged), spread(losses), less])
    return table([axis, "finished", "diverged", "held-out loss", f"less that of {first} [95% interval]"], lines)


def with_margin(results: Sequence[Row], margin: float) -> list[Row]:
    """Return results with "learnt nothing" judged by `margin`, in nats, instead of verdict.LEARNT.

    A member that diverges only by this margin has no step. Other kinds of divergence do not change.
    """

    def judged(result: Row) -> Row:
        if result["status"] == "diverged" and result["reason"] != NOTHING:
            return result
        if result["loss"] <= result["unigram"] - margin:
            return {**result, "status": "finished", "step": None, "reason": None}
        return {**result, "status": "diverged", "reason": NOTHING}

    return [judged(result) for result in results]


def reasons_table(results: Sequence[Row], axis: str) -> str:
    """Return a table with, for each label of an axis, how many members finished, and how many diverged by reason."""
    reasons = list(dict.fromkeys(result["reason"] for result in results if result["reason"]))
    lines = []
    for name in labels(results, axis):
        mine = [result["reason"] for result in where(results, {axis: name})]
        lines.append([name, *(str(mine.count(reason)) for reason in (None, *reasons))])
    return table([axis, "finished", *reasons], lines)


def claims_table(results: Sequence[Row], schemes: Sequence[str], scheme: str = "deepnorm") -> str:
    """Compare a scheme with the others at each depth: does it have the highest stable rate, and the lowest loss?

    A scheme's highest stable rate is the median over seeds; of two medians, the lower. Its best loss is the lowest mean
    over seeds in the grid, among rates where all seeds finished. A difference of two means does not count if it is
    within the root of the sum of their squared spreads. A depth is open until it has all `schemes`.
    """
    lines = []
    for depth in labels(results, DEPTH):
        rates = {name: _median_rate(results, depth, name) for name in schemes}
        best = {name: _best(results, depth, name) for name in schemes}
        complete = all(rate is not None for rate in rates.values())
        cells = [_claim_cell(rates[name], best[name]) for name in schemes]
        judged = [_judge_rate(rates, scheme), _judge_loss(best, scheme)] if complete else ["open", "open"]
        lines.append([depth, *cells, *judged])
    asked = [f"highest rate is {scheme}'s", f"lowest loss is {scheme}'s"]
    return table(["layers", *(f"{name}: rate, loss" for name in schemes), *asked], lines)


def _median_rate(results: Sequence[Row], depth: str, scheme: str) -> float | None:
    """Return the median of the seeds' highest stable rates, 0 if there is none; None while members are missing."""
    seeds = frontier(results).get((depth, scheme))
    return statistics.median_low(value or 0.0 for value in seeds.values()) if seeds else None


def _best(results: Sequence[Row], depth: str, scheme: str) -> list[float]:
    """Return the held-out losses of the seeds at the rate with the lowest mean; empty if no rate has all seeds."""
    by_rate = []
    for rate in labels(results, RATE):
        here = where(results, {DEPTH: depth, SCHEME: scheme, RATE: rate})
        losses = [value for result in here if (value := heldout(result)) is not None]
        if losses and len(losses) == len(here):
            by_rate.append(losses)
    return min(by_rate, key=statistics.fmean, default=[])


def _claim_cell(rate: float | None, losses: Sequence[float]) -> str:
    if rate is None:
        return "not yet"
    return ", ".join([f"{rate:g}" if rate else "none", *([spread(losses)] if losses else [])])


def _judge_rate(rates: Mapping[str, float | None], scheme: str) -> str:
    mine = rates[scheme] or 0.0
    highest = max(value or 0.0 for value in rates.values())
    best = [name for name, value in rates.items() if (value or 0.0) == highest]
    if mine < highest:
        return f"no: {' and '.join(best)}"
    return "yes" if best == [scheme] else f"no more than {' and '.join(name for name in best if name != scheme)}"


def _judge_loss(best: Mapping[str, Sequence[float]], scheme: str) -> str:
    others = {name: losses for name, losses in best.items() if name != scheme and losses}
    if not best[scheme] or not others:
        return "open"
    rival = min(others, key=lambda name: statistics.fmean(others[name]))
    difference = statistics.fmean(best[scheme]) - statistics.fmean(others[rival])
    spreads = [statistics.stdev(losses) for losses in (best[scheme], others[rival]) if len(losses) > 1]
    if abs(difference) <= math.hypot(*spreads):
        return f"within the spread of {rival}"
    return "yes" if difference < 0 else f"no: {rival} by {difference:.3f}"
