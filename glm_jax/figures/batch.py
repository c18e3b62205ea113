"""Figures of a batch: its tokens with their blanks, which tokens may see which, and the positions.

Tokens are drawn as SVG text, so that the reader's own fonts show any script; the rest is matplotlib.
"""

from __future__ import annotations

import unicodedata
from collections.abc import Iterable, Sequence
from typing import NamedTuple, Protocol
from xml.sax.saxutils import escape

import jax.numpy as jnp
import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.room import SpecialTokens
from glm_jax.data.rows.rows import Rows
from glm_jax.figures import style
from glm_jax.model import Visibility

Batch = Rows[np.ndarray]

FONT, MARGIN, WIDTH = 13, 66, 980  # pixels: of letters, of the labels beside a line, of the whole
NARROW, WIDE = 0.62, 1.05  # a letter's width over the font size; wide: Chinese
PLAIN, PADDING = "#f2f2f2", "#ffffff"  # of context tokens outside blanks, and of padding
PALETTE = (*style.COLOURS[4:6], *style.COLOURS[2:4], style.COLOURS[6])  # of blanks, under dark text
LEGEND = ("may not see", "context sees context", "target sees context", "target sees target, up to itself")
CELLS = ("#ffffff", *(style.COLOURS[place] for place in (4, 0, 5)))


class Tokenizer(SpecialTokens, Protocol):
    """What writes tokens as text; see data.tokenizers."""

    token_bytes: np.ndarray

    def decode(self, ids: Iterable[int], *, specials: bool = False) -> str:
        """Return the text of `ids`, special tokens by name if `specials`."""
        ...


class Token(NamedTuple):
    """One place of a row, ready to be drawn."""

    text: str
    colour: str
    bold: bool  # a special token
    target: str  # what is to be predicted here; empty in the context
    positions: tuple[int, ...]


def blanks(batch: Batch, b: int, special: SpecialTokens) -> np.ndarray:
    """Return the number of each place's blank in row b: int64 [S], k at the row's k-th mark and in its target, else 0.

    A target block belongs to the blank whose position its sop has; a sample with one blank has one block.
    """
    tokens, context, segments = batch.tokens[b], batch.context[b], batch.segments[b]  # [S]
    positions = np.atleast_2d(batch.positions[b])[0]  # [S]
    marks = context & np.isin(tokens, [special.mask, special.gmask, special.smask])  # [S]
    number = np.where(marks, np.cumsum(marks), 0)  # [S]
    current = 0
    for place in np.flatnonzero((segments > 0) & ~context):
        if tokens[place] == special.sop:
            own = np.flatnonzero(marks & (segments == segments[place]))
            here = own[positions[own] == positions[place]] if len(own) > 1 else own
            current = number[here[0]]
        number[place] = current
    return number


def row_tokens(batch: Batch, b: int, tokenizer: Tokenizer) -> list[Token]:
    """Return the places of row b up to its padding.

    Args:
        batch: as `Batches.at` returns it.
        b: the row.
        tokenizer: of the batch.
    """
    found, number = [], blanks(batch, b, tokenizer)
    for place in np.flatnonzero(batch.segments[b]):
        token, loss = int(batch.tokens[b, place]), batch.loss_mask[b, place] > 0
        colour = PALETTE[(number[place] - 1) % len(PALETTE)] if number[place] else PLAIN
        target = shown(int(batch.targets[b, place]), tokenizer) if loss else ""
        positions = tuple(int(position) for position in np.atleast_2d(batch.positions[b])[:, place])
        special = tokenizer.token_bytes[token] == 0
        found.append(Token(shown(token, tokenizer), colour, bool(special), target, positions))
    return found


def shown(token: int, tokenizer: Tokenizer) -> str:
    """Return a token as text: special tokens by name, a space as ␣, a newline as ⏎, a byte of a character as ▯."""
    text = tokenizer.decode([token], specials=True)
    return text.translate(str.maketrans(" \n\t\ufffd", "␣⏎⇥▯"))


def tokens_svg(batch: Batch, b: int, tokenizer: Tokenizer, title: str = "") -> str:
    """Draw row b: its tokens, with each blank and its target in one colour, and below them targets and positions.

    Args:
        batch, b, tokenizer: as in `row_tokens`.
        title: comes before the row's objective.

    Returns:
        An SVG document.
    """
    segments = batch.segments[b]
    cells, left, line = [], MARGIN, 0
    rows = ["reads", "predicts"] + ["position", "in block"][: len(np.atleast_2d(batch.positions[b]))]
    height = FONT + 9 + 14 * (len(rows) - 1) + 12
    previous = 1
    for segment, token in zip(segments[segments > 0], row_tokens(batch, b, tokenizer), strict=True):
        width = max(_width(token.text, FONT), _width(token.target, 10), _width(str(max(token.positions)), 10)) + 8
        if left + width > WIDTH or segment != previous:
            left, line = MARGIN, line + 1
        previous = segment
        cells += _cell(token, left, 26 + line * height, width)
        left += width + 2
    for count in range(line + 1):
        top = 26 + count * height
        offsets = [FONT + 2, *(FONT + 20 + 14 * place for place in range(len(rows) - 1))]
        cells += [
            f'<text x="2" y="{top + offset}" font-size="10" fill="#555555">{name}</text>'
            for name, offset in zip(rows, offsets, strict=True)
        ]
    heading = f"{title} {OBJECTIVES[batch.objective[b]]}, {int((segments > 0).sum())} of {len(segments)} places"
    whole = 26 + (line + 1) * height
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{whole}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{whole}" fill="#ffffff"/>',
        f'<text x="2" y="15" font-size="13" font-weight="bold">{escape(heading.strip())}</text>',
        *cells, "</svg>",
    ]) + "\n"  # fmt: skip


def _width(text: str, size: int) -> float:
    letters = (WIDE if unicodedata.east_asian_width(letter) in "WF" else NARROW for letter in text)
    return size * sum(letters)


def _cell(token: Token, left: float, top: float, width: float) -> list[str]:
    """Draw one token's box, with its target and positions under it."""
    middle = left + width / 2
    weight = ' font-weight="bold"' if token.bold else ""
    lines = [(token.target, "#000000"), *((str(position), "#555555") for position in token.positions)]
    return [
        f'<rect x="{left:.1f}" y="{top}" width="{width:.1f}" height="{FONT + 8}" rx="3" fill="{token.colour}"/>',
        f'<text x="{middle:.1f}" y="{top + FONT + 2}" font-size="{FONT}" text-anchor="middle"{weight}>'
        f"{escape(token.text)}</text>",
        *(
            f'<text x="{middle:.1f}" y="{top + FONT + 20 + 14 * place}" font-size="10" text-anchor="middle" '
            f'fill="{colour}">{escape(text)}</text>'
            for place, (text, colour) in enumerate(lines)
            if text
        ),
    ]


def visible(batch: Batch, b: int) -> np.ndarray:
    """Return the kind of pair that query i and key j of row b form: int [S, S], an index into LEGEND.

    Padding counts as seeing nothing, although it may see itself so that no softmax is empty.
    """
    segments, context = batch.segments[b], batch.context[b]  # [S]
    allowed = np.asarray(Visibility(jnp.asarray(segments[None]), jnp.asarray(context[None])).dense())[0]  # [S, S]
    kinds = np.where(context[None, :], np.where(context[:, None], 1, 2), 3)  # [S, S]
    return np.where(allowed & (segments > 0)[:, None], kinds, 0)


def visibility_figure(batch: Batch, rows: Sequence[int], titles: Sequence[str]) -> Figure:
    """Draw which keys (across) each query (down) may see, with a panel for each row and lines between segments."""
    made, axes = style.figure(1, len(rows), width=3.5, height=3.9)
    for axis, b, title in zip(axes, rows, titles, strict=True):
        kinds = visible(batch, b)
        colours = ListedColormap(CELLS)
        axis.imshow(kinds, interpolation="nearest", aspect="auto", cmap=colours, vmin=0, vmax=len(CELLS) - 1)
        segments = batch.segments[b]
        for place in np.flatnonzero(np.diff(segments)):
            axis.axvline(place + 0.5, color=style.INK, linewidth=0.7)
            axis.axhline(place + 0.5, color=style.INK, linewidth=0.7)
        style.finish(axis, "key, place in the row", "query, place in the row" if axis is axes[0] else "", title)
        axis.grid(visible=False)
        axis.spines[:].set_visible(True)
    handles = [Patch(facecolor=cell, edgecolor=style.INK, label=name) for cell, name in zip(CELLS, LEGEND, strict=True)]
    made.legend(handles=handles, loc="outside lower center", ncols=min(4, len(rows)), frameon=False, fontsize=8)
    return made


def positions_figure(batch: Batch, rows: Sequence[int], titles: Sequence[str]) -> Figure:
    """Draw the positions of tokens against their places in the row, with a panel for each row: one stream or two."""
    made, axes = style.figure(1, len(rows), width=3.6, height=2.9)
    names = ("position", "place in the target block") if batch.positions.ndim == 3 else ("position",)
    for axis, b, title in zip(axes, rows, titles, strict=True):
        filled = np.flatnonzero(batch.segments[b])
        streams = np.atleast_2d(batch.positions[b])[:, filled]  # [streams, places]
        for stream, name, colour, marker in zip(streams, names, style.COLOURS, "o^", strict=False):
            axis.plot(filled, stream, marker, markersize=3.2, color=colour, label=name)
        _shade_targets(axis, batch, b)
        style.finish(axis, "place in the row", "position" if axis is axes[0] else "", title, legend=False)
        axis.set(xlim=(-1, len(batch.segments[b])), ylim=(-1, None))
    handles, labels = axes[0].get_legend_handles_labels()
    made.legend(handles, labels, loc="outside lower center", ncols=len(labels), frameon=False, fontsize=8)
    return made


def _shade_targets(axis: Axes, batch: Batch, b: int) -> None:
    """Shade the places whose tokens are targets."""
    targets = np.flatnonzero(np.diff(np.r_[0, batch.loss_mask[b] > 0, 0]))
    for number, (start, stop) in enumerate(targets.reshape(-1, 2)):
        label = "target part" if number == 0 else "_"
        axis.axvspan(start - 0.5, stop - 0.5, color=style.COLOURS[5], alpha=0.22, linewidth=0, label=label)
