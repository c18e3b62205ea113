"""Figures of the 3D mesh: which device holds which part of which array, and what a pipeline schedule costs.

Everything is computed from shapes, partition specs and schedule tables; no device is used.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import to_rgba
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle

from glm_jax.figures import style
from glm_jax.figures.depth import logarithmic
from glm_jax.model import GLMConfig, init, logical_axes
from glm_jax.parallel import partition
from glm_jax.parallel.mesh import AXES
from glm_jax.parallel.pipeline import schedule
from glm_jax.parallel.pipeline.drawing import Slots, columns

Sizes = Mapping[str, int]

MARK = style.COLOURS[1]  # what one device holds
IDLE = "#8888883a"  # the same grey on white and on black
COLOURS = {"F": style.COLOURS[0], "B": style.COLOURS[5]}  # of slots
LENGTHS = {"F": 1, "B": 2}  # of slots
LABELLED = 0.1  # parts of at least this share of the width and the height are labelled with their devices
# Bytes an element: float32 master params and two moments, split over data too; float16 weights; float32 gradient sums.
KINDS: Mapping[str, int] = {"state": 12, "weights": 2, "gradient sums": 4}
Box = tuple[float, float, float, float]  # left, bottom, width, height in the unit square, layer 0 at the top


class Layout(NamedTuple):
    """How one array is laid over the mesh."""

    path: str
    shape: tuple[int, ...]  # in memory: layers padded to the same number on every stage
    axes: tuple[str | None, ...]  # logical axis of each dimension
    weights: jax.P  # spec of the computation's copy
    state: jax.P  # spec of master params and moments


def layouts(cfg: GLMConfig, sizes: Sizes) -> dict[str, Layout]:
    """Return the layout of every parameter by its path, such as blocks/attention/qkv/kernel."""
    axes = logical_axes(cfg)
    shapes = jax.eval_shape(lambda: partition.pad_layers(init(cfg, jax.random.key(0)), axes, sizes["pipeline"]))
    specs = partition.specs(axes), partition.state_specs(axes, cfg.hidden_size, sizes["data"])
    leaves = [jax.tree.leaves(tree, is_leaf=lambda leaf: isinstance(leaf, tuple | jax.P)) for tree in (axes, *specs)]
    found = {}
    for (path, array), *rest in zip(jax.tree_util.tree_leaves_with_path(shapes), *leaves, strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        found[name] = Layout(name, array.shape, *rest)
    return found


def entries(spec: jax.P, dimensions: int) -> list[tuple[str, ...]]:
    """Return the mesh axes that split each dimension of an array, outermost first."""
    filled = [*spec, *[None] * (dimensions - len(spec))]
    return [() if entry is None else (entry,) if isinstance(entry, str) else tuple(entry) for entry in filled]


def held(shape: Sequence[int], spec: jax.P, sizes: Sizes, device: Mapping[str, int]) -> tuple[slice, ...]:
    """Return the part of an array that a device holds.

    Args:
        shape: of the whole array; its split dimensions divide evenly.
        spec: how it is split.
        sizes: of the mesh's axes.
        device: its place on each of them.
    """
    parts = []
    for length, axes in zip(shape, entries(spec, len(shape)), strict=True):
        index = 0
        for axis in axes:
            index = index * sizes[axis] + device[axis]
        width = length // math.prod(sizes[axis] for axis in axes)
        parts.append(slice(index * width, (index + 1) * width))
    return tuple(parts)


def box(shape: Sequence[int], spec: jax.P, sizes: Sizes, device: Mapping[str, int]) -> Box:
    """Place a device's part in the unit square: `pipeline` splits from top to bottom, other axes from left to right.

    If both `tensor` and `data` split columns, `data` splits each part of `tensor` again.
    """
    top, bottom, left, right = 0.0, 1.0, 0.0, 1.0
    named = entries(spec, len(shape))
    order = sorted(range(len(shape)), key=lambda dimension: "data" in named[dimension])  # data cuts last
    parts = held(shape, spec, sizes, device)
    for dimension in order:
        start, stop = parts[dimension].start / shape[dimension], parts[dimension].stop / shape[dimension]
        if "pipeline" in named[dimension]:
            top, bottom = start, stop
        elif named[dimension]:
            left, right = left + start * (right - left), left + stop * (right - left)
    return left, 1 - bottom, right - left, bottom - top


def devices(sizes: Sizes) -> list[dict[str, int]]:
    """Return the places of all devices of a mesh."""
    return [dict(zip(AXES, place, strict=True)) for place in itertools.product(*(range(sizes[axis]) for axis in AXES))]


def partition_figure(
    cfg: GLMConfig, sizes: Sizes, paths: Sequence[str], device: Mapping[str, int], title: str
) -> Figure:
    """Draw the parts of arrays: the computation's weights above, the state below, with one device's parts marked.

    Args:
        cfg, sizes: the model and the mesh.
        paths: of the arrays, see `layouts`.
        device: the one to mark, by its place on each mesh axis.
        title: of the figure.
    """
    found = layouts(cfg, sizes)
    made, axes = style.figure(2, len(paths), width=2.5, height=2.7)
    for place, path in enumerate(paths):
        layout = found[path]
        for row, (kind, spec) in enumerate((("weights", layout.weights), ("state", layout.state))):
            _draw_parts(axes[row * len(paths) + place], layout, spec, cfg, sizes, device)
            if row == 0:
                axes[place].set_title("\n".join(path.removeprefix("blocks/").rsplit("/", 1)), fontsize=9)
            if place == 0:
                label = axes[row * len(paths)].get_ylabel()
                axes[row * len(paths)].set_ylabel(f"{kind}\n{label}", fontsize=8)
    place_of = ", ".join(f"{axis} {device[axis]}" for axis in AXES)
    handles = [Patch(facecolor="none", edgecolor=MARK, linewidth=2, label=f"held by device ({place_of})")]
    if cfg.num_layers % sizes["pipeline"]:
        handles.append(Patch(facecolor="white", edgecolor=style.INK, hatch="////", label="padding, no layers"))
    made.legend(handles=handles, loc="outside lower center", ncols=2, frameon=False, fontsize=9)
    made.suptitle(title, fontsize=11, color=style.INK)
    return made


def _draw_parts(
    axis: Axes, layout: Layout, spec: jax.P, cfg: GLMConfig, sizes: Sizes, device: Mapping[str, int]
) -> None:
    """Draw one array as the unit square, each part in its stage's colour, and label the axes with its dimensions."""
    used = partition.mesh_axes(spec)
    shades = [matplotlib.colormaps[style.MAP](place) for place in np.linspace(0.25, 0.95, sizes["pipeline"])]
    parts: dict[Box, dict[str, int]] = {}
    for each in devices(sizes):
        parts.setdefault(box(layout.shape, spec, sizes, each), each)
    for (left, bottom, width, height), owner in parts.items():
        shade = shades[owner["pipeline"]] if "pipeline" in used else IDLE
        axis.add_patch(Rectangle((left, bottom), width, height, facecolor=shade, edgecolor="white", linewidth=0.3))
        if min(width, height) >= LABELLED:
            label = " ".join(f"{name[0]}{owner[name]}" for name in AXES if name in used) or "whole"
            axis.text(left + width / 2, bottom + height / 2, label, ha="center", va="center", fontsize=7,
                      color=style.contrast(shade))  # fmt: skip
    if "layers" in layout.axes and layout.shape[0] > cfg.num_layers:
        padding = 1 - cfg.num_layers / layout.shape[0]
        axis.add_patch(Rectangle((0, 0), 1, padding, facecolor="white", edgecolor=style.INK, hatch="////", lw=0.4))
    left, bottom, width, height = box(layout.shape, spec, sizes, device)
    axis.add_patch(Rectangle((left, bottom), width, height, fill=False, edgecolor=MARK, linewidth=2.2, zorder=3))
    named = list(zip(layout.axes, layout.shape, entries(spec, len(layout.shape)), strict=True))
    down = [f"{name} {length:,} over {' x '.join(over)}" for name, length, over in named if "pipeline" in over]
    across = [f"{name} {length:,} over {over[0]}" for name, length, over in named if over and "pipeline" not in over]
    copies = [name for name in AXES if name not in used and sizes[name] > 1]
    across += [f"copies along {', '.join(copies)}"] if copies else []
    axis.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xticks=[], yticks=[])
    axis.spines[:].set_visible(False)
    axis.set_xlabel("\n".join(across), fontsize=7)
    axis.set_ylabel("\n".join(down), fontsize=7)


def bytes_a_device(cfg: GLMConfig, sizes: Sizes) -> dict[str, int]:
    """Return the bytes of params-sized arrays on each device, by `KINDS`; activations and the stash are not counted."""
    total = dict.fromkeys(KINDS, 0)
    for layout in layouts(cfg, sizes).values():
        for kind, size in KINDS.items():
            spec = layout.state if kind == "state" else layout.weights
            parts = math.prod(sizes[axis] for axis in partition.mesh_axes(spec))
            total[kind] += size * math.prod(layout.shape) // parts
    return total


def bytes_figure(cfg: GLMConfig, meshes: Sequence[Sizes], memory: float, title: str) -> Figure:
    """Draw `bytes_a_device` of several meshes, in GB of 1e9 bytes, and a line at a device's memory in GB."""
    made, (axis,) = style.figure(1, 1, width=7.5, height=0.9 + 0.42 * len(meshes))
    places = np.arange(len(meshes))[::-1]
    found = [bytes_a_device(cfg, sizes) for sizes in meshes]
    rows = {kind: [each[kind] / 1e9 for each in found] for kind in KINDS}
    rows["sum"] = [sum(each.values()) / 1e9 for each in found]
    for (kind, values), marker, colour in zip(rows.items(), "osD|", [*style.COLOURS[:3], style.INK], strict=True):
        size = 16 if kind == "sum" else 6
        axis.plot(values, places, marker, color=colour, markersize=size, markeredgewidth=2, label=kind)
    axis.axvline(memory, color=style.INK, linestyle="--", linewidth=1.4, label=f"{memory:g} GB")
    axis.set_yticks(places, [" x ".join(str(sizes[axis]) for axis in AXES) for sizes in meshes])
    logarithmic(axis.xaxis)
    style.finish(axis, "GB a device", " x ".join(AXES), title, legend=False)
    made.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=8)
    return made


def timeline(schedules: Sequence[schedule.Schedule], title: str) -> Figure:
    """Draw schedules below one another on one time axis, a row per stage; a backward slot is as long as two forward."""
    height = 0.55 + 0.3 * max(each.stages for each in schedules)
    made, axes = style.figure(len(schedules), 1, width=9.5, height=height)
    slots = [columns(each) for each in schedules]
    end = max(sum(LENGTHS[slot.kind] for slot in each) for each in slots)
    for axis, each, row in zip(axes, schedules, slots, strict=True):
        lefts = itertools.accumulate((LENGTHS[slot.kind] for slot in row), initial=0)
        draw_slots(axis, [*zip(lefts, row, strict=False)])
        axis.set(yticks=range(each.stages), ylim=(each.stages - 0.5, -0.5))
        stash = ", ".join(map(str, each.in_flight))
        name = f"{each.name}: bubble {float(each.bubble):.1%}, stash slots by stage {stash}"
        style.finish(axis, "time, in forward slots" if axis is axes[-1] else "", "stage", name, legend=False)
        axis.grid(visible=False)
    for axis in axes:
        axis.set_xlim(0, end)
    made.legend(handles=slot_kinds(), loc="outside lower center", ncols=3, frameon=False, fontsize=9)
    made.suptitle(title, fontsize=11, color=style.INK)
    return made


def draw_slots(axis: Axes, slots: Sequence[tuple[int, Slots]], inches: float = 1.0, flat: bool = False) -> None:
    """Draw slots at their places in time, a row a stage, each job with its microbatch where there is room for it.

    Args:
        axis: its units are forward slots.
        slots: with where each begins, in order.
        inches: of a forward slot.
        flat: whether to draw one image without numbers, which takes less time and room for many slots.
    """
    if flat:
        _draw_image(axis, slots)
        return
    for left, slot in slots:
        width = LENGTHS[slot.kind]
        for stage, microbatch in enumerate(slot.microbatches):
            idle = microbatch == schedule.IDLE
            colour = IDLE if idle else COLOURS[slot.kind]
            place = (left, stage - 0.42)
            axis.add_patch(Rectangle(place, width, 0.84, facecolor=colour, edgecolor="white", linewidth=0.5))
            size = min(7.0, 110 * inches * width / len(str(microbatch)))  # points
            if not idle and size >= 6:
                axis.text(left + width / 2, stage, str(microbatch), ha="center", va="center", fontsize=size,
                          color="white" if slot.kind == "F" else "black")  # fmt: skip


def _draw_image(axis: Axes, slots: Sequence[tuple[int, Slots]]) -> None:
    left, last = slots[-1]
    end, stages = left + LENGTHS[last.kind], len(last.microbatches)
    image = np.zeros((stages, end, 4))
    for left, slot in slots:
        for stage, microbatch in enumerate(slot.microbatches):
            colour = IDLE if microbatch == schedule.IDLE else COLOURS[slot.kind]
            image[stage, left : left + LENGTHS[slot.kind]] = to_rgba(colour)
    axis.imshow(image, extent=(0, end, stages - 0.5, -0.5), aspect="auto", interpolation="nearest")


def slot_kinds() -> list[Patch]:
    """Return what a legend needs to explain the colours of slots."""
    shown = (("forward", COLOURS["F"]), ("backward", COLOURS["B"]), ("idle", IDLE))
    return [Patch(facecolor=colour, label=name) for name, colour in shown]


def stash_and_bubble(stages: int, microbatches: Sequence[int], marked: int, title: str) -> Figure:
    """Draw the costs of schedules against M: the idle share of time, and the most stash slots that a stage needs.

    Args:
        stages: P.
        microbatches: values of M.
        marked: one of them, to mark with a line.
        title: of the figure.
    """
    made, (idle, stash) = style.figure(1, 2, width=4.6, height=3.0)
    for name, colour, width, line in (("gpipe", style.COLOURS[4], 4.5, "-"), ("1f1b", style.COLOURS[0], 1.6, "--")):
        tables = [schedule.build(name, stages, count) for count in microbatches]
        shares, slots = [100 * float(table.bubble) for table in tables], [max(table.in_flight) for table in tables]
        for axis, costs in ((idle, shares), (stash, slots)):
            axis.plot(microbatches, costs, color=colour, linewidth=width, linestyle=line, label=name)
    for axis, y, name in ((idle, "idle time, %", "Bubble"), (stash, "stash slots of the fullest stage", "Stash")):
        axis.axvline(marked, color=MARK, linewidth=1.2, linestyle=":", label=f"M = {marked}")
        logarithmic(axis.xaxis)
        if axis is stash:
            logarithmic(axis.yaxis)
        style.finish(axis, f"microbatches M ({stages} stages)", y, name)
    made.suptitle(title, fontsize=11, color=style.INK)
    return made
