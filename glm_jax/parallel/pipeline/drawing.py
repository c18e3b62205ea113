"""Timelines of a schedule, as text and as SVG: one row a stage, time to the right."""

from __future__ import annotations

from typing import NamedTuple

from glm_jax.parallel.pipeline.schedule import IDLE, Schedule

FORWARD_COLOUR, BACKWARD_COLOUR, IDLE_COLOUR = "#4c78a8", "#f58518", "#eeeeee"
UNIT, ROW, MARGIN = 14, 22, 64  # SVG pixels: a forward slot's width, a stage's height, the labels' width


class Slots(NamedTuple):
    """One column of a timeline: what each stage does in a slot."""

    kind: str  # F or B
    microbatches: tuple[int, ...]  # by stage, or IDLE


def columns(schedule: Schedule) -> list[Slots]:
    """Return the slots in order of time, without those in which every stage is idle, which take no time."""
    pairs = zip(schedule.forward, schedule.backward, strict=True)
    slots = [Slots(kind, row) for pair in pairs for kind, row in zip("FB", pair, strict=True)]
    return [slot for slot in slots if any(microbatch != IDLE for microbatch in slot.microbatches)]


def ascii_timeline(schedule: Schedule, width: int = 120) -> str:
    """Draw lines of about `width` characters at most. `F3` is the forward of microbatch 3, a dot an idle slot."""
    slots = columns(schedule)
    cell = len(str(schedule.microbatches - 1)) + 2
    label = len(f"stage {schedule.stages - 1} ")
    per_panel = max(1, (width - label) // cell)
    panels = []
    for start in range(0, len(slots), per_panel):
        lines = []
        for stage in range(schedule.stages):
            jobs = ((slot.kind, slot.microbatches[stage]) for slot in slots[start : start + per_panel])
            cells = ("." if microbatch == IDLE else f"{kind}{microbatch}" for kind, microbatch in jobs)
            lines.append(f"stage {stage}".ljust(label) + "".join(text.ljust(cell) for text in cells).rstrip())
        panels.append("\n".join(lines))
    return "\n\n".join([*panels, summary(schedule)]) + "\n"


def summary(schedule: Schedule) -> str:
    """Return one line on what the schedule costs."""
    bubble = schedule.bubble
    return (
        f"{schedule.name}: {schedule.stages} stages, {schedule.microbatches} microbatches, {schedule.ticks} ticks, "
        f"bubble {bubble} ({float(bubble):.1%}), stash slots by stage {', '.join(map(str, schedule.in_flight))}"
    )


def svg_timeline(schedule: Schedule) -> str:
    """Draw an SVG document; a backward slot is twice as wide as a forward one."""
    left, shapes = MARGIN, []
    for slot in columns(schedule):
        width = UNIT if slot.kind == "F" else 2 * UNIT
        for stage, microbatch in enumerate(slot.microbatches):
            shapes.append(_cell(left, stage * ROW, width, slot.kind, microbatch))
        left += width
    labels = [
        f'<text x="4" y="{stage * ROW + 15}" font-size="12">stage {stage}</text>' for stage in range(schedule.stages)
    ]
    height = schedule.stages * ROW + ROW
    caption = f'<text x="4" y="{height - 6}" font-size="12">{summary(schedule)}</text>'
    width = max(left + 4, 7 * len(summary(schedule)))
    opening = f'<svg xmlns="http://www.w3.org/2000/svg" width="{width}" height="{height}" font-family="sans-serif">'
    return "\n".join([opening, *labels, *shapes, caption, "</svg>"]) + "\n"


def _cell(x: int, y: int, width: int, kind: str, microbatch: int) -> str:
    if microbatch == IDLE:
        colour, text = IDLE_COLOUR, ""
    else:
        colour = FORWARD_COLOUR if kind == "F" else BACKWARD_COLOUR
        text = (
            f'<text x="{x + width / 2:g}" y="{y + 14}" font-size="9" text-anchor="middle" '
            f'fill="#ffffff">{microbatch}</text>'
        )
    return f'<rect x="{x}" y="{y + 1}" width="{width - 1}" height="{ROW - 3}" fill="{colour}"/>{text}'
