"""The page of a plan: whether it fits, its mesh and pipeline, memory, speed, traffic, and all its numbers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from html import escape

from matplotlib.figure import Figure

from glm_jax.config import Experiment
from glm_jax.config.fields import flatten
from glm_jax.figures import page as pages
from glm_jax.figures import plan_drawings as drawings
from glm_jax.figures import style
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import layout, remedies
from glm_jax.planning.compile import Report, Verdict
from glm_jax.planning.estimate import Cost, Plan
from glm_jax.planning.layout import Layout
from glm_jax.planning.numbers import significant
from glm_jax.planning.remedies import Remedy

STYLE = """
.verdict { border-left: 6px solid var(--colour); padding: .3rem .9rem; margin: 1rem 0; font-size: 1.15rem; }
.note { font-size: .9rem; max-width: 60rem; }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.4rem; font-size: .85rem; margin: .3rem 0; padding: 0; }
.key li { list-style: none; } .key span { display: inline-block; width: .9em; height: .9em; margin-right: .4em;
       vertical-align: -.1em; background: var(--colour); }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font-size: .85rem; margin: .6rem 0; }
.scroll td { white-space: nowrap; } h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; }
""".strip()
GOOD, BAD, UNKNOWN = style.COLOURS[2], style.COLOURS[1], "#888888"
GB = drawings.GB
READABLE = 900  # pixels: drawings scroll in narrower windows


@dataclass(frozen=True)
class Planned:
    """What a page shows; a plan may have an estimate, compiled programs, or both.

    Attributes:
        name: of the experiment, as the user writes it.
        experiment: whose plan it is.
        target: as the user writes it.
        node: devices a node; None if all are in one.
        memory: bytes of a device that arrays may take; None if that is not known.
        command: that made the plan.
        estimate: of a training step.
        programs: compiled, each with the verdict on it where there is one.
        remedies: for a step that does not fit.
    """

    name: str
    experiment: Experiment
    target: str
    node: int | None
    memory: int | None
    command: str
    estimate: Plan | None = None
    programs: Sequence[tuple[Report, Verdict | None]] = ()
    remedies: Sequence[Remedy] = ()


def page(planned: Planned) -> str:
    """Return the page, which needs no other file.

    Raises:
        UserError: the model does not fit the mesh.
    """
    found = layout.layout(planned.experiment)
    estimate, trains = planned.estimate, planned.estimate is not None
    devices = f"{math.prod(found.mesh.values()):,} x {planned.target}"
    title = f"{planned.name} on {devices}"
    parts = [
        f"<h1>{escape(title)}</h1>",
        _verdict(planned),
        pages.facts(_facts(planned, found)),
        f"<pre><code>{escape(planned.command)}</code></pre>",
        *_memory(planned, found),
        *_remedies(planned),
        *_mesh(planned, found),
        *(_timeline(planned.experiment, estimate) if estimate else ()),
        *(_speed(estimate) if estimate and estimate.known_rates else ()),
        *_traffic(planned),
        *_arrays(planned),
        *_numbers(planned),
        *(_state(found) if trains else ()),
        f"<footer>{escape(_made(planned))}</footer>",
    ]
    return pages.document(title, parts, STYLE)


def _verdict(planned: Planned) -> str:
    """Return whether it fits: by the compiled programs, else by the estimate."""
    judged = [(report, one) for report, one in planned.programs if one]
    if judged:
        report, worst = min(judged, key=lambda pair: (pair[1].fits, pair[1].margin))
        peak, bound, fits, source = report.memory.peak, worst.memory, worst.fits, f"compiled {report.program}"
        if report.memory.temporaries is None:
            text = f"the compiler refuses {report.program}, which needs {peak / GB:,.2f} GB a device or more"
            return _judgement(BAD, f"<b>Does not fit</b>: {text}")
    elif planned.memory and planned.estimate:
        peak, bound, source = planned.estimate.memory.total, planned.memory, "estimated, not compiled"
        fits = planned.estimate.fits(bound)
    else:
        text = "Whether it fits is not known: give --memory, such as 40GB, or a --target whose memory is known"
        return _judgement(UNKNOWN, text)
    word, left = ("Fits", "to spare") if fits else ("Does not fit", "too much")
    amount = f"{peak / GB:,.2f} of {bound / GB:,.2f} GB a device, {abs(bound - peak) / GB:,.3f} GB {left}"
    return _judgement(GOOD if fits else BAD, f"<b>{word}</b>: it takes {amount} ({source})")


def _judgement(colour: str, text: str) -> str:
    return f'<p class="verdict" style="--colour: {colour}">{text}</p>'


def _facts(planned: Planned, found: Layout) -> Iterator[tuple[str, str]]:
    yield "mesh: data x pipeline x tensor", " x ".join(f"{size:,}" for size in found.mesh.values())
    estimate = planned.estimate
    if estimate is None:
        for report, _ in planned.programs:
            yield f"GB a device, {report.program}", f"{report.memory.peak / GB:,.2f}"
        return
    yield "parameters", f"{estimate.total_parameters:,}"
    if estimate.known_rates:
        yield "seconds a step", _between(estimate.fastest.step_seconds, estimate.slowest.step_seconds)
        yield "MFU", f"{_between(100 * estimate.slowest.mfu, 100 * estimate.fastest.mfu)}%"
        yield "days", _between(estimate.fastest_run.days, estimate.slowest_run.days)
        costs = estimate.fastest_run, estimate.slowest_run
        if (energy := [cost.kilowatt_hours for cost in costs if cost.kilowatt_hours is not None])[1:]:
            yield "MWh", _between(energy[0] / 1e3, energy[1] / 1e3)
        if (carbon := [cost.carbon_kilograms for cost in costs if cost.carbon_kilograms is not None])[1:]:
            yield "t of CO2", _between(carbon[0] / 1e3, carbon[1] / 1e3)
    yield "steps", f"{estimate.steps:,}"
    yield "row tokens", pages.short(estimate.tokens)


def _between(low: float, high: float) -> str:
    return f"{significant(low)}–{significant(high)}"


def _drawing(drawn: Figure, caption: str = "") -> str:
    """Return a drawing at its own size at most; in a narrow window it scrolls."""
    width = round(100 * drawn.get_figwidth())
    sizes = f"max-width: {width}px; min-width: {min(width, READABLE)}px"
    below = f"<figcaption>{caption}</figcaption>" if caption else ""
    return f'<figure><div class="scroll"><div style="{sizes}">{style.svg(drawn)}</div></div>{below}</figure>'


def _memory(planned: Planned, found: Layout) -> Iterator[str]:
    rows: list[tuple[str, Mapping[str, tuple[int, str]]]] = []
    if planned.estimate:
        sizes = {name: getattr(planned.estimate.memory, name) for name in drawings.PARTS}
        rows.append(("estimate", {name: (size, drawings.PARTS[name]) for name, size in sizes.items()}))
    for report, _ in planned.programs:
        name = "compiled" if report.program == "step" else report.program
        rows.append((name, {"peak": (report.memory.peak, drawings.COMPILED)}))
    yield "<h2>Memory of a device</h2>"
    yield _drawing(drawings.memory(rows, planned.memory))
    if planned.estimate:
        parts = "".join(
            f'<li style="--colour: {colour}"><span></span>{name} {size / GB:,.3f} GB</li>'
            for name, (size, colour) in rows[0][1].items()
        )
        yield f'<ul class="key">{parts}</ul>'
    uneven = len(set(map(len, found.stages))) > 1
    more = " A stage with fewer layers holds padding in their place." if uneven else ""
    yield (
        '<p class="note">One number for all devices: they run one program, with the same arrays on every stage.'
        f"{more} Libraries that devices communicate with take more, which is not counted.</p>"
    )


def _remedies(planned: Planned) -> Iterator[str]:
    if not planned.programs or planned.estimate is None:
        return
    report, judged = planned.programs[0]
    if judged is None or judged.fits:
        return
    yield "<h2>What would let it fit</h2>"
    if not planned.remedies:
        yield "<p>No change of schedule, stash, microbatches or mesh on as many devices takes less memory.</p>"
        return
    if not planned.remedies[0].verdict.fits:
        yield "<p>These take less memory, but do not let it fit.</p>"
    rows = [
        (
            f"<code>{escape(remedies.shown(one.changes))}</code>",
            "fits" if one.verdict.fits else "does not fit",
            f"{report.memory.peak / GB:,.2f}",
            f"{one.report.memory.peak / GB:,.2f}",
            "" if one.cost is None else significant(one.cost),
        )
        for one in planned.remedies
    ]
    heads = ("change", "", "GB a device now", "GB with it", "seconds a step, if nothing overlaps")
    yield pages.table(heads, rows, range(2, 5))


def _mesh(planned: Planned, found: Layout) -> Iterator[str]:
    replicas, stages, shards = (found.mesh[axis] for axis in ("data", "pipeline", "tensor"))
    devices = stages * shards
    drawn = drawings.mesh(found, planned.experiment.model.num_heads, planned.node)
    lines = [
        f"{layout.stages_line([*map(len, found.stages)])}. Each device holds the attention heads and the share of the "
        f"feed-forward features of its row, for the layers of its column"
        f"{f', and 1/{devices} of the vocabulary' if devices > 1 else ''}."
    ]
    if replicas > 1:
        split = any("data" in str(one.spec) for one in found.arrays)
        kept = f"; it keeps 1/{replicas} of its part of the master params and moments" if split else ""
        lines.append(f"Replica d has devices {devices}d to {devices}d + {devices - 1}, and its own rows{kept}.")
    if any(drawings.nodes(stages, shards, planned.node)):
        lines.append(f"Outlined: a node of {planned.node} devices.")
    yield "<h2>Mesh</h2>"
    yield _drawing(drawn, escape(" ".join(lines)))


def _timeline(experiment: Experiment, estimate: Plan) -> Iterator[str]:
    stages, microbatches = estimate.mesh["pipeline"], experiment.train.microbatches
    table = schedule.build(estimate.schedule, stages, microbatches)
    yield "<h2>Pipeline</h2>"
    yield (
        f'<p class="note">{escape(table.name)}: {stages} stage{"s" if stages > 1 else ""} x {microbatches:,} '
        f"microbatches, {table.ticks:,} ticks, a bubble of {float(table.bubble):.1%} of a stage's time; "
        f"microbatches that a stage keeps at most: {', '.join(map(str, table.in_flight))}.</p>"
    )
    if stages > 1:
        yield _drawing(drawings.timeline(table), "Numbers are microbatches.")


def _speed(estimate: Plan) -> Iterator[str]:
    yield "<h2>Speed</h2>"
    yield _drawing(drawings.bracket(estimate.fastest.step_seconds, estimate.slowest.step_seconds))
    rows = [
        (
            name,
            significant(one.step_seconds, 4),
            f"{one.tokens_per_second:,.0f}",
            f"{one.mfu:.1%}",
            f"{one.hfu:.1%}",
            *cost,
        )
        for name, one, cost in (
            ("everything overlaps", estimate.fastest, _cost(estimate.fastest_run)),
            ("nothing overlaps", estimate.slowest, _cost(estimate.slowest_run)),
        )
    ]
    heads = ("if", "seconds a step", "tokens/s", "MFU", "HFU", "days", "MWh", "t of CO2")
    yield pages.table(heads, rows, range(1, len(heads)))
    yield (
        '<p class="note">Rooflines of the peak, the memory and the links of the device. Days are for '
        f"{estimate.steps:,} steps without failures; energy is that of the devices at their full power.</p>"
    )


def _cost(cost: Cost) -> tuple[str, str, str]:
    energy = "" if cost.kilowatt_hours is None else significant(cost.kilowatt_hours / 1e3, 4)
    carbon = "" if cost.carbon_kilograms is None else significant(cost.carbon_kilograms / 1e3, 4)
    return significant(cost.days), energy, carbon


def _traffic(planned: Planned) -> Iterator[str]:
    compiled = [report for report, _ in planned.programs if report.collectives]
    sent = planned.estimate.sent if planned.estimate else {}
    if not compiled and not sent:
        return
    yield "<h2>Communication by axis</h2>"
    if planned.estimate and sent:
        yield _drawing(drawings.traffic(sent, planned.estimate.mesh, planned.node), "Estimated.")
    for report in compiled:
        rows = [
            (
                escape(one.axes) or "none",
                one.kind,
                " x ".join("n" if trips is None else f"{trips:,}" for trips in one.loops) or "once",
                f"{one.count:,}",
                f"{one.bytes / 1e6:,.3f}",
            )
            for one in sorted(report.collectives, key=lambda one: one.axes)
        ]
        yield f"<h3>Collectives of a device in the compiled {escape(report.program)}</h3>"
        yield '<p class="note">Trips of n: known only as it runs.</p>'
        heads = (
            "axes",
            "kind",
            "trips of its loops",
            "collectives",
            "MB if each runs once",
        )
        yield pages.table(heads, rows, range(3, 5))


def _arrays(planned: Planned) -> Iterator[str]:
    for report, _ in planned.programs:
        if not report.buffers:
            continue
        rows = [
            (
                f"{one.bytes / GB:,.3f}",
                f"{one.count:,}",
                f"<code>{escape(one.shape)}</code>",
                escape(one.operation),
                escape(one.function),
                f"<code>{escape(one.line)}</code>",
            )
            for one in report.buffers
        ]
        yield f"<h2>Largest arrays of the compiled {escape(report.program)}</h2>"
        yield '<p class="note">Those that are not needed at the same time share memory.</p>'
        yield pages.table(("GB each", "arrays", "shape", "made by", "in", "line"), rows, range(2))


def _numbers(planned: Planned) -> Iterator[str]:
    """Yield every number that `--json` has, under its names there; arrays and collectives have tables of their own."""
    found: dict[str, object] = {}
    if planned.estimate:
        found |= flatten({"estimate": planned.estimate.to_json()})
    for place, (report, judged) in enumerate(planned.programs):
        own = {name: value for name, value in report.to_json().items() if name not in ("buffers", "collectives")}
        own["verdict"] = {"fits": judged.fits, "memory": judged.memory, "margin": judged.margin} if judged else None
        found |= flatten({f"compiled.{place}": own})
    rows = [(f"<code>{escape(name)}</code>", escape(_plain(value))) for name, value in found.items()]
    yield "<details><summary>All numbers, in bytes, seconds, operations or as they are named</summary>"
    yield pages.table(("name", "value"), rows, (1,))
    yield "</details>"


def _plain(value: object) -> str:
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value)


def _state(found: Layout) -> Iterator[str]:
    rows = [
        tuple(f"<code>{escape(text)}</code>" for text in (one.path, one.size, str(one.spec))) + (f"{one.bytes:,}",)
        for one in found.arrays
    ]
    yield f"<details><summary>The state on the mesh: {found.bytes():,} bytes a device</summary>"
    yield '<p class="note">A shape such as (70+2)x12288 has 70 true layers and 2 of padding.</p>'
    yield pages.table(("array", "shape", "spec", "bytes a device"), rows, (3,))
    yield "</details>"


def _made(planned: Planned) -> str:
    if not planned.programs:
        return "Estimated from shapes; nothing was compiled, and nothing ran."
    return f"Compiled from shapes with jax {planned.programs[0][0].jax}; nothing ran."
