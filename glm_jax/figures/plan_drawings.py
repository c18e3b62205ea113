"""The drawings of a plan: its mesh, its pipeline's timeline, the memory of a device, a step's time and traffic."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from matplotlib.axes import Axes
from matplotlib.collections import PatchCollection
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from glm_jax.figures import style
from glm_jax.figures.mesh import LENGTHS, draw_slots, slot_kinds
from glm_jax.parallel.pipeline import schedule
from glm_jax.parallel.pipeline.drawing import Slots, columns
from glm_jax.planning import speed
from glm_jax.planning.layout import Layout

GB = 1e9
WIDTH, LABELS = 11.6, 1.7  # inches: of a drawing over the whole page, and of the labels at its left
ROW = 0.3  # inches of a row of devices
MOST_ROWS = 24  # more members of `tensor` share the height of so many
SPELLED = 0.8  # inches of a column in which its layers are written out
MOST_LABELS = 256  # devices of a replica that are drawn with their numbers
MOST_REPLICAS = 64
DEVICE, HELD = "#cfe3f1", style.COLOURS[0]  # a device, under dark text; layers that are there
STEADY = 6  # slots that are drawn at each end of a stretch in which all stages work
CUT = 4  # the width of what is left out, in forward slots
FLAT = 2_000  # jobs from which on a timeline is one image, instead of many shapes
TICKS = 14  # on the axis of time, at most
# the parts of an estimate's total, see `planning.memory.Memory`
PARTS: Mapping[str, str] = dict(zip(
    ("params", "moments", "weights", "gradients", "stash", "messages", "rows", "work"),
    (*style.COLOURS, "#999999"), strict=True,
))  # fmt: skip
COMPILED = "#555555"


def mesh(layout: Layout, heads: int, node: int | None) -> Figure:
    """Draw the devices of the first replica, a column a stage and a row a member of `tensor`; all replicas below.

    Args:
        layout: of the run.
        heads: of attention.
        node: devices a node, which are outlined; None if all are in one.
    """
    stages, shards, replicas = (layout.mesh[axis] for axis in ("pipeline", "tensor", "data"))
    high = min(1, MOST_ROWS / shards)
    width = min(WIDTH, max(5.5, LABELS + 1.2 * stages))
    column = (width - LABELS) / stages  # inches
    top, bottom = -2.3, shards * high + (2.2 if replicas > 1 else 0.1)
    made, (axis,) = style.figure(1, 1, width=width, height=ROW * (bottom - top))
    labelled = stages * shards <= MOST_LABELS and column > 0.25
    for stage in range(stages):
        _stage(axis, layout, stage, column)
        axis.add_patch(Rectangle((stage + 0.03, 0), 0.94, shards * high, facecolor=DEVICE, edgecolor="none"))
        for shard in range(shards if labelled else 0):
            _text(axis, stage + 0.5, (shard + 0.5) * high, str(stage * shards + shard), color="black")
    if high == 1:
        axis.hlines(range(1, shards), 0, stages, color="white", linewidth=2.5)
    outlines = [Rectangle((left, above * high), wide, tall * high) for left, above, wide, tall in
                nodes(stages, shards, node)]  # fmt: skip
    axis.add_collection(PatchCollection(outlines, facecolor="none", edgecolor=style.INK, linewidth=1.4))
    if column < SPELLED:
        _text(axis, -0.1, -0.85, "stage", ha="right")
    if replicas > 1:
        _replicas(axis, stages, shards * high + 1.0, replicas, stages * shards, width - LABELS)
    every = -(-shards // MOST_ROWS)
    shown = [*range(0, shards, every)]
    names = [
        f"tensor {shard}: {span('head', shard * heads // shards, (shard + 1) * heads // shards)}" for shard in shown
    ]
    axis.set_yticks([(shard + 0.5) * high for shard in shown], names)
    axis.set(xlim=(-0.02, stages + 0.02), ylim=(bottom, top), xticks=[])
    axis.tick_params(length=0)
    axis.spines[:].set_visible(False)
    return made


def span(name: str, start: int, stop: int) -> str:
    """Return `layers 0–8`, `layer 3` or `no layers`, given the first and what comes after the last."""
    if stop - start > 1:
        return f"{name}s {start}–{stop - 1}"
    return f"{name} {start}" if stop > start else f"no {name}s"


def _text(axis: Axes, x: float, y: float, text: str, **options: Any) -> None:
    """Write text of matplotlib's `options`, by default in the page's colour and around its place."""
    axis.text(x, y, text, **{"ha": "center", "va": "center", "fontsize": 8, "color": style.INK} | options)


def _stage(axis: Axes, layout: Layout, stage: int, column: float) -> None:
    """Write a stage's layers over its column, and a bar of the places that it has for them."""
    held, room = layout.stages[stage], len(layout.stages[0])
    full = 0.94 * len(held) / room
    axis.add_patch(Rectangle((stage + 0.03, -0.5), full, 0.32, facecolor=HELD, edgecolor="none"))
    if len(held) < room:
        axis.add_patch(Rectangle((stage + 0.03 + full, -0.5), 0.94 - full, 0.32, facecolor="none",
                                 edgecolor=style.INK, hatch="/////", linewidth=0.6))  # fmt: skip
    empty = room - len(held)
    lines = [f"stage {stage}", span("layer", held.start, held.stop), *([f"{empty} empty"] if empty else [])]
    if column >= SPELLED:
        _text(axis, stage + 0.5, -2.15, "\n".join(lines), va="top")
    elif column > 0.25 or stage % 5 == 0:
        _text(axis, stage + 0.5, -0.85, str(stage), fontsize=7)


def nodes(stages: int, shards: int, node: int | None) -> Iterator[tuple[int, int, int, int]]:
    """Yield each node's first stage and member of `tensor`, and how many it has of both; none if it is no rectangle.

    Args:
        stages, shards: of a replica.
        node: devices a node; None if all are in one.
    """
    if node is None or node >= stages * shards:
        return
    if node % shards == 0:
        wide = node // shards
        yield from ((left, 0, min(wide, stages - left), shards) for left in range(0, stages, wide))
    elif shards % node == 0:
        yield from ((stage, above, 1, node) for stage in range(stages) for above in range(0, shards, node))


def _replicas(axis: Axes, stages: int, top: float, replicas: int, devices: int, inches: float) -> None:
    """Draw the members of `data` as a strip, each with its devices; the first is the one above."""
    count = min(replicas, MOST_REPLICAS)
    width = stages / count
    for place in range(count):
        replica = replicas - 1 if place == count - 1 else place
        skipped = replicas > count and place == count - 2
        axis.add_patch(Rectangle((place * width + 0.003 * stages, top), width - 0.006 * stages, 0.9,
                                 facecolor="none" if skipped else DEVICE, edgecolor=style.INK,
                                 linewidth=1.4 if place == 0 else 0.4))  # fmt: skip
        numbers = f"{replica * devices}–{(replica + 1) * devices - 1}" if devices > 1 else f"{replica}"
        if skipped or 0.053 * len(numbers) < inches / count:
            _text(
                axis,
                (place + 0.5) * width,
                top + 0.45,
                "…" if skipped else numbers,
                fontsize=6,
                color=style.INK if skipped else "black",
            )
    title = f"all {replicas:,} replicas (data 0–{replicas - 1}) and their devices; the first is drawn above"
    _text(axis, 0, top - 0.12, title, ha="left", va="bottom")


def timeline(table: schedule.Schedule) -> Figure:
    """Draw a schedule, each job as long as it takes, without the middle of stretches in which every stage works."""
    rows = min(table.stages, MOST_ROWS)
    made, (axis,) = style.figure(1, 1, width=WIDTH, height=1.15 + 0.26 * rows)
    left = time = 0
    placed = list[tuple[int, Slots]]()
    times = list[int]()
    for steady, slots in stretches(table):
        start, cut = left, _cut(slots) if steady else range(0)
        for place, slot in enumerate(slots):
            if place == cut.start and cut:
                more = sum(LENGTHS[slots[each].kind] for each in cut)
                _text(axis, left + CUT / 2, (table.stages - 1) / 2, f"…\n{more:,}\nmore\n…")
                left += CUT
            if place not in cut:
                placed.append((left, slot))
                times.append(time)
                left += LENGTHS[slot.kind]
            time += LENGTHS[slot.kind]
        axis.plot([start + 0.2, left - 0.2], [-0.85, -0.85], color=style.INK, linewidth=0.8 if steady else 2.5)
        _text(axis, (start + left) / 2, -1.0, "all stages work" if steady else "some stages idle", va="bottom")
    draw_slots(axis, placed, WIDTH / left, flat=len(placed) * table.stages > FLAT)
    style.finish(axis, "time since the step began, in forward slots; a backward slot is as long as two", "stage")
    axis.grid(visible=False)
    axis.set(xlim=(0, left), ylim=(table.stages - 0.5, -1.9))
    axis.set_yticks(range(0, table.stages, -(-table.stages // MOST_ROWS)))
    every = -(-len(placed) // TICKS)
    axis.set_xticks([place for place, _ in placed[::every]], [f"{at:,}" for at in times[::every]])
    axis.spines[["left"]].set_visible(False)
    forward, backward, idle = slot_kinds()
    idle.set_label(f"idle: the bubble, {float(table.bubble):.1%} of a stage's time")
    made.legend(
        handles=[forward, backward, idle], loc="outside upper right", ncols=3, frameon=False, labelcolor=style.INK
    )
    return made


def stretches(table: schedule.Schedule) -> Iterator[tuple[bool, list[Slots]]]:
    """Yield the slots of a schedule by stretches, and whether all stages work in all of a stretch's slots."""

    def busy(slot: Slots) -> bool:
        return schedule.IDLE not in slot.microbatches

    found = list[tuple[bool, list[Slots]]]()
    for full, run in groupby(columns(table), key=busy):
        slots = [*run]
        steady = full and len(slots) >= STEADY
        if found and not steady and not found[-1][0]:
            found[-1][1].extend(slots)
        else:
            found.append((steady, slots))
    yield from found


def _cut(slots: Sequence[Slots]) -> range:
    """Return which slots of a steady stretch are not drawn."""
    return range(STEADY, len(slots) - STEADY) if len(slots) > 3 * STEADY else range(0)


def memory(rows: Sequence[tuple[str, Mapping[str, tuple[int, str]]]], bound: int | None) -> Figure:
    """Draw the memory of a device as stacked bars, and its bound as a line.

    Args:
        rows: names of bars with their parts: bytes and colours by name.
        bound: bytes that arrays may take.
    """
    made, (axis,) = style.figure(1, 1, width=WIDTH, height=0.85 + 0.6 * len(rows))
    totals = [sum(size for size, _ in parts.values()) for _, parts in rows]
    end = 1.12 * max(*totals, bound or 0) / GB
    for place, ((_, parts), total) in enumerate(zip(rows, totals, strict=True)):
        left = 0.0
        for name, (size, colour) in parts.items():
            axis.barh(place, size / GB, left=left, height=0.62, color=colour, edgecolor="white", linewidth=0.6)
            label = f"{name}\n{_gigabytes(size)}"
            if size / GB / end * WIDTH > 0.1 + 0.065 * len(label.split("\n")[0]):
                _text(axis, left + size / GB / 2, place, label, fontsize=7.5, color=style.contrast(colour))
            left += size / GB
        near = bound and 0 <= bound - total < 0.05 * end * GB
        beside = (bound if near and bound else total) / GB + 0.005 * end
        _text(axis, beside, place, _gigabytes(total), ha="left", fontsize=9, fontweight="bold")
    if bound:
        axis.axvline(bound / GB, color=style.INK, linewidth=2.2)
        _text(axis, bound / GB - 0.005 * end, -0.44, f"bound {bound / GB:,.2f} GB", ha="right", va="bottom", fontsize=9)
    axis.set_yticks(range(len(rows)), [name for name, _ in rows])
    axis.set(ylim=(len(rows) - 0.5, -0.85), xlim=(0, end))
    style.finish(axis, "GB (1e9 bytes) a device", legend=False)
    return made


def _gigabytes(size: int) -> str:
    return f"{size / GB:,.{2 if size >= GB else 3}f}"


def bracket(fastest: float, slowest: float) -> Figure:
    """Draw between which two times a step is, in seconds."""
    made, (axis,) = style.figure(1, 1, width=WIDTH, height=1.05)
    axis.plot([fastest, slowest], [0, 0], color=style.COLOURS[0], linewidth=7, solid_capstyle="butt")
    _text(axis, fastest, 0.55, f"{fastest:,.4g} s: everything overlaps", ha="left", fontsize=9)
    _text(axis, slowest, -0.55, f"{slowest:,.4g} s: nothing overlaps", ha="right", fontsize=9)
    axis.set(xlim=(0, 1.3 * slowest), ylim=(-1, 1), yticks=[])
    axis.spines[["left"]].set_visible(False)
    style.finish(axis, "seconds a step", legend=False)
    return made


def traffic(sent: Mapping[str, int], sizes: Mapping[str, int], node: int | None) -> Figure:
    """Draw what a device sends in a step, by mesh axes.

    Args:
        sent: bytes by axes, such as `pipeline+tensor`.
        sizes: of the mesh's axes.
        node: devices a node; None if all are in one.
    """
    ordered = sorted(sent.items(), key=lambda one: -one[1])
    made, (axis,) = style.figure(1, 1, width=WIDTH, height=0.75 + 0.26 * len(ordered))
    end = 1.12 * ordered[0][1] / GB
    for place, (_, size) in enumerate(ordered):
        axis.barh(place, size / GB, height=0.66, color=style.COLOURS[0])
        label = f"{size / GB:,.3f}" if size >= 1e6 else "under 0.001"
        _text(axis, size / GB + 0.005 * end, place, label, ha="left")
    within = {axes: node is None or speed.span(axes, sizes) <= node for axes in sent}
    axis.set_yticks(
        range(len(ordered)), [f"{axes} ({'in a node' if within[axes] else 'between nodes'})" for axes, _ in ordered]
    )
    axis.set(ylim=(len(ordered) - 0.5, -0.5), xlim=(0, end or 1))
    style.finish(axis, "GB (1e9 bytes) that a device sends in a step", legend=False)
    return made
