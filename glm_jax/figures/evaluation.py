"""The page of an evaluation: its numbers with intervals, and examples of what the model made of the items."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape

from glm_jax.evaluation import measures
from glm_jax.evaluation.measures import Estimate
from glm_jax.evaluation.results import Evaluation, as_json, counts, interval, shown
from glm_jax.evaluation.run import FileReport, TaskReport
from glm_jax.figures import page as pages
from glm_jax.figures import style

LONGEST = 600  # characters of an example's text; its end is shown
MOST_BARS = 60  # of a figure

STYLE = """
.example { border-left: 3px solid var(--colour); padding: .2rem .8rem; margin: .7rem 0; font-size: .9rem; }
.example p { margin: .2rem 0; white-space: pre-wrap; overflow-wrap: anywhere; } .example small { opacity: .75; }
.scroll th { white-space: normal; vertical-align: bottom; } .scroll td:first-child { white-space: nowrap; }
.failed { border-left: 3px solid #d55e00; padding-left: .8rem; }
nav { display: flex; flex-wrap: wrap; gap: .2rem 1rem; }
nav a { color: inherit; } .paper { font-size: .9rem; opacity: .85; }
""".strip()
HIT, MISS = style.COLOURS[2], style.COLOURS[1]


def page(found: Evaluation) -> str:
    """Return the page, which needs no other file."""
    made = found.made
    given = json.loads(json.dumps(as_json(found)))
    facts = [
        ("tasks", str(len(found.reports))),
        ("items", f"{sum(file.items for report in found.reports for file in report.files):,}"),
        ("contexts cut", f"{sum(file.truncated for report in found.reports for file in report.files):,}"),
        ("step", str(made.model.get("step"))),
        ("dtype", str(made.model.get("dtype"))),
        ("seconds", f"{made.seconds:,.1f}"),
        ("tokens a second", f"{given['tokens_per_second']:,.0f}"),
    ]
    links = "".join(f'<a href="#task-{place}">{escape(one.task.name)}</a>' for place, one in enumerate(found.reports))
    failures = "".join(f'<p class="failed">{escape(one.error)}</p>' for one in found.failures)
    parts = [
        f"<h1>Evaluation of {escape(str(made.model.get('workdir')))}</h1>",
        pages.facts(facts),
        f"<h2>Failed</h2>{failures}" if failures else "",
        f"<nav>{links}</nav>" if len(found.reports) > 1 else "",
        *(_task(place, report) for place, report in enumerate(found.reports)),
        f"<footer><code>{escape(made.command)}</code><br>Intervals: 95%, bootstrap over items, "
        f"{measures.RESAMPLES:,} resamples, seed {measures.SEED}.</footer>",
    ]
    return pages.document("Evaluation", parts, STYLE)


def _task(place: int, report: TaskReport) -> str:
    paper = f'<p class="paper">To be compared with: {escape(report.paper)}.</p>' if report.paper else ""
    examples = "".join(_examples(file) for file in report.files)
    shown_examples = f"<details><summary>Examples</summary>{examples}</details>" if examples else ""
    return f'<h2 id="task-{place}">{escape(report.task.name)}</h2>{paper}{_figure(report)}{_files(report)}' + (
        _groups(report) + shown_examples
    )


def _figure(report: TaskReport) -> str:
    """Return a figure of the first measure of each file, with its interval."""
    bars = list(_bars(report))[:MOST_BARS]
    if len(bars) < 2:
        return ""
    names = [label for label, _, _ in bars]
    drawn, (axis,) = style.figure(1, 1, width=11.6, height=0.9 + 0.24 * len(bars))
    for row, (_, _, one) in enumerate(bars):
        axis.plot([one.low, one.high], [row, row], color=style.COLOURS[0], linewidth=2, solid_capstyle="butt")
        axis.plot([one.value], [row], "o", color=style.COLOURS[0], markersize=5)
    axis.set_yticks(range(len(bars)), names)
    axis.set_ylim(len(bars) - 0.5, -0.5)
    style.finish(axis, x=f"{bars[0][1]}{' (%)' if measures.measure(bars[0][1]).percent else ''}")
    return f"<figure>{style.svg(drawn)}</figure>"


def _bars(report: TaskReport) -> Iterator[tuple[str, str, Estimate]]:
    """Yield a label, the measure and its value: of the files, or of the parts of a single file."""
    first = next(iter(report.files[0].estimates))
    if len(report.files) > 1:
        for file in report.files:
            if first in file.estimates:
                yield f"{file.group}: {file.name}"[-60:], first, file.estimates[first]
        return
    for name, one in report.files[0].estimates.items():
        if "/" in name and name.partition("/")[0] == first:
            yield name.partition("/")[2], first, one


def _files(report: TaskReport) -> str:
    counted = counts(report.files)
    rows = [
        (
            *map(escape, (file.group, file.name, name)),
            *(shown(name, one.value), interval(name, one), f"{one.items:,}", *map(str, others.values())),
        )
        for file, others in zip(report.files, counted, strict=True)
        for name, one in file.estimates.items()
    ]
    return _table(("group", "file", "measure"), ("value", "95% interval", "items", *counted[0]), rows)


def _groups(report: TaskReport) -> str:
    if len(report.files) < 2:
        return ""
    rows = [
        (
            *map(escape, (group, name)),
            *(str(one.files), *(shown(name, x) for x in (one.highest, one.median, one.mean, one.weighted))),
        )
        for group, summaries in report.groups.items()
        for name, one in summaries.items()
    ]
    return "<h3>Groups</h3>" + _table(("group", "measure"), ("files", "max", "median", "mean", "weighted"), rows)


def _table(texts: tuple[str, ...], numbers: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    return pages.table((*texts, *numbers), rows, range(len(texts), len(texts) + len(numbers)))


def _examples(file: FileReport) -> str:
    made = list[str]()
    for one in file.examples:
        text = one.text.strip() if len(one.text) <= LONGEST else f"…{one.text[-LONGEST:].rstrip()}"
        verdict = "hit" if one.right else f"miss; expected: {escape(one.expected)}"
        colour = HIT if one.right else MISS
        made.append(
            f'<div class="example" style="--colour: {colour}"><p>{escape(text)}</p>'
            f"<p><b>{escape(one.found) or '(nothing)'}</b> <small>{verdict}</small></p></div>"
        )
    return f"<h3>{escape(file.name)}</h3>{''.join(made)}" if made else ""
