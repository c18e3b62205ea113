"""What all pages share: one file that needs no other, its style, its facts and its tables."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from html import escape

STYLE = """
:root { color-scheme: light dark; --faint: #8886; --page: #fff; --text: #262626; }
@media (prefers-color-scheme: dark) { :root { --page: #16181c; --text: #d8d8d8; } }
body { max-width: 1200px; margin: 0 auto; padding: 1.5rem; background: var(--page); color: var(--text);
       font: 15px/1.45 sans-serif; }
h1 { font-size: 1.7rem; margin: 0; } h2 { font-size: 1.2rem; margin: 2rem 0 .6rem; }
.facts { display: flex; flex-wrap: wrap; gap: .8rem 2.4rem; margin: 1rem 0; }
.facts div { display: flex; flex-direction: column-reverse; }
.facts dt { font-size: .8rem; opacity: .75; } .facts dd { margin: 0; font-size: 1.25rem; }
@media (max-width: 700px) { body { padding: .8rem; } }
figure { margin: 0; min-width: 0; }
figure svg { width: 100%; height: auto; display: block; } svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: .8rem; opacity: .8; padding-left: .5rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-size: .88rem; }
th, td { text-align: left; vertical-align: top; padding: .3rem .8rem .3rem 0; border-bottom: 1px solid var(--faint); }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
code { font-size: .92em; overflow-wrap: anywhere; }
summary { cursor: pointer; margin-top: 1.2rem; } footer { margin-top: 2rem; font-size: .8rem; opacity: .75; }
""".strip()


def document(title: str, parts: Iterable[str], style: str = "") -> str:
    """Return a whole page.

    Args:
        title: of the window, as text.
        parts: of the body, as HTML; empty ones are left out.
        style: beside `STYLE`.
    """
    lines = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta name="viewport" content="width=device-width"><title>{escape(title)}</title>',
        f"<style>{STYLE}\n{style}</style></head><body>",
        *(part for part in parts if part),
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def facts(pairs: Iterable[tuple[str, str]]) -> str:
    """Return names and values, as text, for the top of a page."""
    terms = (f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in pairs)
    return f'<dl class="facts">{"".join(terms)}</dl>'


def table(heads: Sequence[str], rows: Iterable[Sequence[str]], numbers: Collection[int] = ()) -> str:
    """Return a table that scrolls where it is too wide.

    Args:
        heads: of the columns, as text.
        rows: of cells, as HTML.
        numbers: the columns that hold numbers.
    """
    classes = [' class="number"' if column in numbers else "" for column in range(len(heads))]
    head = "".join(f"<th{kind}>{escape(name)}</th>" for kind, name in zip(classes, heads, strict=True))
    body = "\n".join(
        f"<tr>{''.join(f'<td{kind}>{cell}</td>' for kind, cell in zip(classes, row, strict=True))}</tr>" for row in rows
    )
    return f'<div class="scroll"><table><thead><tr>{head}</tr></thead><tbody>\n{body}\n</tbody></table></div>'


def short(count: int) -> str:
    """Return a large count with three digits: 12.3 billion."""
    for size, word in ((1e12, "trillion"), (1e9, "billion"), (1e6, "million")):
        if count >= size:
            return f"{count / size:.3g} {word}"
    return f"{count:,}"
