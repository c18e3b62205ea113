"""`glm-jax report`: a run's curves and events on one self-contained page, or in one picture."""

from __future__ import annotations

import datetime
import json
import textwrap
from collections.abc import Collection, Iterable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax.config import default_values
from glm_jax.config.fields import flatten
from glm_jax.errors import UserError
from glm_jax.figures import page as pages
from glm_jax.storage.files import write_atomic
from glm_jax.types import Json
from glm_jax.workdir.folder import CONFIG
from glm_jax.workdir.history import MARK_NAMES, Mark, Record, read

if TYPE_CHECKING:
    from glm_jax.figures.curves import Panel

PAGE = "report.html"
PANELS_A_ROW = 2

STYLE = """
.marks { display: flex; flex-wrap: wrap; gap: .3rem 1.6rem; font-size: .85rem; }
.marks span::before { content: ""; display: inline-block; height: 1em; margin-right: .5em; vertical-align: -.15em;
                      border-left: 2px var(--dashes) var(--colour); }
.curves { display: grid; grid-template-columns: 1fr 1fr; gap: 1.2rem 1.6rem; margin-top: 1rem; }
@media (max-width: 700px) { .curves { grid-template-columns: minmax(0, 1fr); } }
.wide { grid-column: 1 / -1; }
.fills { margin: 0; padding: 0; list-style: none; } .fills li { margin: .5rem 0; } .fills small { opacity: .75; }
""".strip()


def write(workdir: Path, out: Path | None = None) -> Path:
    """Draw the record of a run.

    Args:
        workdir: of the run, which may still be in progress.
        out: the file to write, an .html page or a .png picture; by default report.html in the workdir.

    Returns:
        The file that was written.

    Raises:
        UserError: the record is missing or damaged, the file cannot be written, or matplotlib is not installed.
    """
    path = out or workdir / PAGE
    if path.suffix.lower() not in (".html", ".htm", ".png"):
        raise UserError(f"--out {path} is neither a page nor a picture: end its name in .html or .png")
    record = read(workdir)
    config = _read_config(workdir)
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("report needs matplotlib: pip install -e '.[plots]'") from error
    name = workdir.absolute().name
    made = picture(record, config, name) if path.suffix.lower() == ".png" else page(record, config, name)
    try:
        write_atomic(path, made)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): name another file with --out") from error
    return path


def page(record: Record, config: Json, name: str) -> str:
    """Return the page: facts, fills, curves, events, and where the config differs from the defaults."""
    from glm_jax.figures import curves

    panels = curves.panels(record)
    still = [panel for panel in panels if panel.constant]
    folded = ""
    if still:
        names = ", ".join(panel.title for panel in still)
        summary = f"<summary>Never changed: {escape(names)}</summary>"
        folded = f"<details>{summary}{_curves(still)}</details>"
    parts = [
        f"<h1>{escape(name)}</h1>",
        pages.facts(facts(record, config)),
        _fills(record),
        _marks_legend(record),
        _curves([panel for panel in panels if not panel.constant]),
        folded,
        _events_table(record.marks),
        _config_table(config),
        _versions(record),
    ]
    return pages.document(name, parts, STYLE)


def _curves(panels: Iterable[Panel]) -> str:
    from glm_jax.figures import style

    figures = []
    for panel in panels:
        drawn, (axis,) = style.figure(1, 1, width=11.6 if panel.wide else 5.7, height=3.4 if panel.wide else 2.7)
        panel.draw(axis)
        kind = ' class="wide"' if panel.wide else ""
        caption = f"<figcaption>{escape(panel.caption)}</figcaption>" if panel.caption else ""
        figures.append(f"<figure{kind}>{style.svg(drawn)}{caption}</figure>")
    return f'<div class="curves">{"".join(figures)}</div>'


def _fills(record: Record) -> str:
    """Return the run's own fills, with the text that was there."""
    items = []
    for event in record.events.get("fill", []):
        text = escape(str(event["text"])).replace("[MASK]", f"<mark>{escape(str(event['filled']))}</mark>", 1)
        source, target = escape(str(event["source"])), escape(str(event["target"]))
        items.append(f"<li>{text}<br><small>{source}, was: {target}</small></li>")
    return f'<h2>Fills</h2><ul class="fills">{"".join(items)}</ul>' if items else ""


def _versions(record: Record) -> str:
    versions = record.last("start").get("versions", {})
    listed = ", ".join(f"{package} {version}" for package, version in versions.items())
    return f"<footer>{escape(listed)}</footer>" if listed else ""


def picture(record: Record, config: Json, name: str) -> bytes:
    """Return the curves as one PNG, with the facts at its top."""
    from glm_jax.figures import curves, style

    panels = curves.panels(record)
    rows = -(-len(panels) // PANELS_A_ROW)
    drawn, axes = style.figure(max(rows, 1), PANELS_A_ROW)
    for axis, panel in zip(axes, panels, strict=False):
        panel.draw(axis)
    for axis in axes[len(panels) :]:
        axis.remove()
    head = "   ".join(f"{key}: {value}" for key, value in facts(record, config))
    keys = curves.mark_keys(record)
    if keys:
        drawn.legend(handles=keys, loc="outside lower left", ncols=len(keys), frameon=False)
    drawn.suptitle("\n".join([name, *textwrap.wrap(head, 150)]), fontsize=9, x=0.01, ha="left")
    return style.png(drawn)


def facts(record: Record, config: Json) -> list[tuple[str, str]]:
    """Return the facts at the top of a report as (name, value): how far the run is, its losses, speed and devices."""
    train, heldout = record.last("train"), record.last("evaluation")
    total = config.get("train", {}).get("steps")
    step = f"{record.last_step:,}" + (f" of {total:,}" if total else "")
    found = [("step", step)]
    if "samples" in train:
        found.append(("samples", f"{train['samples']:,}"))
    if tokens := record.tokens():
        found.append(("tokens, about", pages.short(tokens)))
    if "loss" in train:
        found.append(("training loss", f"{train['loss']:.4f}"))
    for key, value in sorted(heldout.items()):  # the loss of all comes before those of sources
        if key == "loss" or key.startswith("loss/"):
            found.append((" ".join(["held-out loss", *key.split("/")[1:]]), f"{value:.4f}"))
    if speed := train.get("tokens_per_second"):
        found.append(("tokens a second", f"{speed:,.0f}"))
    if seconds := record.seconds():
        found.append(("training time, about", str(datetime.timedelta(seconds=round(seconds)))))
    start = record.last("start")
    if {"platform", "devices"} <= start.keys():
        found.append(("devices", f"{start['devices']} ({start['platform']})"))
    return found


def differences(config: Json) -> list[tuple[str, object, object]]:
    """Return (key, value, default) where a config differs from the defaults; None where there is no default."""
    data = config.get("data", {})
    names = {table: data.get(table, {}) for table in ("sources", "instructions")}
    defaults = json.loads(json.dumps(default_values(names)))  # tuples become lists, as in the workdir's file
    return [
        (key, value, defaults.get(key))
        for key, value in flatten(config)
        if key not in defaults or defaults[key] != value
    ]


def _read_config(workdir: Path) -> Json:
    """Read the workdir's config as plain values, as it may be of another version; empty if there is none."""
    path = workdir / CONFIG
    try:
        config = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        differences(config)
        if not isinstance(config.get("train", {}).get("steps", 0), int):
            raise TypeError("train.steps is no number")
    except (OSError, ValueError, TypeError, AttributeError, RecursionError) as error:
        raise UserError(f"{path} is damaged: restore it, or delete it") from error
    return config


def _marks_legend(record: Record) -> str:
    from glm_jax.figures.curves import MARK_STYLES

    spans = []
    for kind in record.kinds():
        colour, dashes = MARK_STYLES[kind]
        border = "dashed" if dashes == "dashdot" else dashes
        spans.append(f'<span style="--colour: {colour}; --dashes: {border}">{escape(MARK_NAMES[kind])}</span>')
    return f'<div class="marks">{"".join(spans)}</div>' if spans else ""


def _events_table(marks: Iterable[Mark]) -> str:
    rows = [
        (
            str(mark.number),
            f"{mark.step:,}",
            "" if mark.samples is None else f"{mark.samples:,}",
            escape(MARK_NAMES[mark.kind] + (f" ({mark.cause})" if mark.kind == "intervention" and mark.cause else "")),
            "<br>".join(f"<code>{escape(line)}</code>" for line in mark.lines),
        )
        for mark in marks
    ]
    return _titled("Events", ["", "step", "samples", "event", "what"], rows, range(3))


def _config_table(config: Json) -> str:
    rows = [
        (f"<code>{escape(key)}</code>", _code(value), _code(default)) for key, value, default in differences(config)
    ]
    return _titled("Config, where it differs from the defaults", ["key", "value", "default"], rows)


def _titled(title: str, heads: Sequence[str], rows: Sequence[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Return a titled table; empty without rows."""
    return f"<h2>{escape(title)}</h2>\n{pages.table(heads, rows, numbers)}" if rows else ""


def _code(value: object) -> str:
    return "" if value is None else f"<code>{escape(json.dumps(value, ensure_ascii=False))}</code>"
