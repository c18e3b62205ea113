"""What the figures of the notebooks are drawn from: a summary of each, kept in notebooks/figures.json.

    python tests/notebooks/figure_data.py [NOTEBOOK ...]

executes notebooks as readers see them and writes the file anew, once each has been executed and saved itself: their
pictures must be those that are drawn here, byte for byte, so that the file tells of what is seen.
"""

from __future__ import annotations

import base64
import hashlib
import json
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import nbformat
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.collections import Collection
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from matplotlib.legend import Legend
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.spines import Spine
from matplotlib.text import Annotation, Text
from matplotlib.ticker import FixedFormatter, FuncFormatter
from nbclient import NotebookClient

from glm_jax.figures import style

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
DATA = FOLDER / "figures.json"
CELL_TIMEOUT = 900  # seconds, on a busy machine, too
SHORT = 16  # numbers that are written out; of more there is a summary
TOLERANCE = 2e-6  # of the largest number; other versions of jax differ by less

_drawn: list[dict[str, Any]] = []  # in the kernel, what was recorded so far


def execute(notebook: Any, record: bool = False) -> list[dict[str, Any]]:
    """Execute a notebook in place; give what its figures are drawn from if `record`, one each, in their order."""
    first = f"import sys\nsys.path.insert(0, {str(Path(__file__).parent)!r})\nimport figure_data\nfigure_data.record()"
    hooks = [nbformat.v4.new_code_cell(source) for source in (first, "figure_data.show()")] if record else []
    if hooks:
        notebook.cells = [hooks[0], *notebook.cells, hooks[1]]
    resources = {"metadata": {"path": str(FOLDER)}}
    # a busy machine sends what a cell prints in pieces
    options = {"timeout": CELL_TIMEOUT, "kernel_name": "python3", "coalesce_streams": True}
    NotebookClient(notebook, resources=resources, **options).execute()
    if not hooks:
        return []
    notebook.cells = notebook.cells[1:-1]
    return json.loads(hooks[1].outputs[0].text)


def record() -> None:
    """In the kernel: keep a summary of each figure that is drawn."""
    draw = style.png

    def png(drawn: Figure, *arguments: Any) -> bytes:
        picture = draw(drawn, *arguments)
        _drawn.append({"figure": figure_data(drawn), "sha256": hashlib.sha256(picture).hexdigest()})
        return picture

    style.png = png


def show() -> None:
    """In the kernel: print what was kept."""
    print(json.dumps(_drawn))


def pictures(notebook: Any) -> list[str]:
    """Return the digests of the pictures that a notebook shows, in their order."""
    outputs = [output.get("data", {}) for cell in notebook.cells for output in cell.get("outputs", [])]
    found = [base64.b64decode(data["image/png"]) for data in outputs if "image/png" in data]
    return [hashlib.sha256(picture).hexdigest() for picture in found]


def figure_data(drawn: Figure) -> dict[str, Any]:
    """Summarise a figure: all words and numbers that it is drawn from, nothing of how they are laid out."""
    words = [text.get_text() for text in drawn.texts]
    legends = [text.get_text() for legend in drawn.legends for text in legend.get_texts()]
    return {"words": [drawn.get_suptitle(), *words, *legends], "axes": [_axes_data(axes) for axes in drawn.axes]}


def _axes_data(axes: Axes) -> dict[str, Any]:
    children = [child for child in axes.get_children() if child.get_visible() and child is not axes.patch]
    titles = [axes.get_title(place) for place in ("left", "center", "right")]
    legends = [text.get_text() for child in children if isinstance(child, Legend) for text in child.get_texts()]
    texts = [child for child in children if isinstance(child, Text) and child.get_text() not in ["", *titles]]
    kinds: dict[str, list[Any]] = {}
    for child in children:
        if isinstance(child, Collection | Patch | AxesImage) and not isinstance(child, Spine):
            kinds.setdefault(type(child).__name__, []).append(child)
    return {
        "words": [*titles, axes.get_xlabel(), axes.get_ylabel(), *legends],
        "ticks": [_named_ticks(axes.xaxis), _named_ticks(axes.yaxis)],
        "scales": [axes.get_xscale(), axes.get_yscale()],
        "limits": numbers([*axes.get_xlim(), *axes.get_ylim()]),
        "lines": _lines_data([child for child in children if isinstance(child, Line2D)]),
        "texts": [text.get_text() for text in texts],
        "places": numbers([text.xy if isinstance(text, Annotation) else text.get_position() for text in texts]),
        **{kind: _shapes_data(shapes) for kind, shapes in sorted(kinds.items())},
    }


def _named_ticks(axis: Axis) -> list[str]:
    """Return the words at an axis, if the figure chose them; numbers are matplotlib's choice."""
    chosen = isinstance(axis.get_major_formatter(), FixedFormatter | FuncFormatter)
    return [label.get_text() for label in axis.get_ticklabels()] if chosen else []


def _lines_data(lines: Sequence[Line2D]) -> list[dict[str, Any]]:
    """Summarise the lines of each name and look together, such as those of several seeds."""
    groups: dict[tuple[str, ...], list[Line2D]] = {}
    for line in lines:
        label = str(line.get_label())
        look = to_hex(line.get_color()), str(line.get_linestyle()), str(line.get_marker())
        groups.setdefault(("" if label.startswith("_") else label, *look), []).append(line)
    return [
        {
            "words": list(words),
            "lines": len(group),
            "x": numbers(_join([line.get_xdata() for line in group])),
            "y": numbers(_join([line.get_ydata() for line in group])),
        }
        for words, group in groups.items()
    ]


def _shapes_data(shapes: Sequence[Any]) -> dict[str, Any]:
    """Summarise bars, marks, areas or images of one kind: their outlines and places, values and colours."""
    outlines, places, values, colours = [], [], [], Counter()
    for shape in shapes:
        if isinstance(shape, AxesImage):
            outlines.append(shape.get_extent())
            values.append(np.ma.filled(np.ma.asarray(shape.get_array(), float), np.nan))
            continue
        if isinstance(shape, Patch):
            outlines.append(shape.get_patch_transform().transform_path(shape.get_path()).vertices)
            colours[to_hex(shape.get_facecolor(), keep_alpha=True)] += 1
            continue
        outlines += [path.vertices for path in shape.get_paths()]
        places.append(shape.get_offsets())
        if shape.get_array() is not None:
            values.append(np.ma.filled(np.ma.asarray(shape.get_array(), float), np.nan))
        colours.update(to_hex(colour, keep_alpha=True) for colour in shape.get_facecolor())
    found = {"outlines": outlines, "places": places, "values": values}
    joined = {name: numbers(_join(arrays)) for name, arrays in found.items() if arrays}
    return {"number": len(shapes), **joined, "colours": [f"{n} {colour}" for colour, n in sorted(colours.items())]}


def _join(arrays: Iterable[Any]) -> np.ndarray:
    return np.concatenate([np.ravel(np.asarray(np.ma.filled(array, np.nan), float)) for array in arrays])


def numbers(values: Any) -> dict[str, Any]:
    """Write numbers out to eight digits if they are few, else what tells them from others.

    That is their number, how many are not finite, the first, the last, the extremes, the mean, and the mean with
    weights that grow from first to last, which sees their order.
    """
    found = np.ravel(np.asarray(values, float))
    finite = found[np.isfinite(found)]
    shown = list(finite)
    if finite.size > SHORT:
        weighted = finite * np.linspace(0, 1, finite.size)
        shown = [finite[0], finite[-1], finite.min(), finite.max(), finite.mean(), weighted.mean()]
    return {
        "number": found.size,
        "not finite": int(found.size - finite.size),
        "values": [float(f"{value:.8g}") for value in shown],
    }


def differences(expected: Any, found: Any, place: str = "") -> list[str]:
    """List where two summaries differ by more than TOLERANCE of the largest number around."""
    if isinstance(expected, dict) and isinstance(found, dict):
        if expected.keys() != found.keys():
            return [f"{place}: {sorted(expected)} became {sorted(found)}"]
        return [line for key in expected for line in differences(expected[key], found[key], f"{place} {key}")]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        if all(isinstance(value, float) for value in [*expected, *found]):
            room = TOLERANCE * max(map(abs, expected), default=0.0)
            near = all(abs(one - other) <= room for one, other in zip(expected, found, strict=True))
            return [] if near else [f"{place}: {expected} became {found}"]
        pairs = enumerate(zip(expected, found, strict=True), 1)
        return [line for number, pair in pairs for line in differences(*pair, f"{place} {number}")]
    return [] if expected == found else [f"{place}: {expected!r} became {found!r}"]


def written(kept: dict[str, list[dict[str, Any]]]) -> str:
    """Return the file's text: a line for each figure."""
    figures = {name: [json.dumps(figure, ensure_ascii=False) for figure in kept[name]] for name in sorted(kept)}
    parts = [f"{json.dumps(name)}: [\n" + ",\n".join(lines) + "\n]" for name, lines in figures.items()]
    return "{\n" + ",\n".join(parts) + "\n}\n"


def main() -> int:
    """Write the summaries of the notebooks that are named, or of those that are in the file; returns the exit code."""
    kept = json.loads(DATA.read_text(encoding="utf-8")) if DATA.exists() else {}
    for name in sys.argv[1:] or list(kept):
        notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
        seen = pictures(notebook)
        kept[name] = execute(notebook, record=True)
        if seen != [figure["sha256"] for figure in kept[name]]:
            print(f"{name} shows other pictures than are drawn here: execute and save it first", file=sys.stderr)
            return 1
    DATA.write_text(written(kept), encoding="utf-8")
    return 0


if __name__ == "__main__":
    sys.exit(main())
