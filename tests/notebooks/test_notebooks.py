"""Every notebook runs in its small mode; what is committed is a clean run of its full mode, and what that gives now."""

import base64
import json
import re

import nbformat
import numpy as np
import pytest
from figure_data import DATA, FOLDER, differences, execute, figure_data, pictures
from matplotlib.figure import Figure

NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
SMALL = [path for path in NOTEBOOKS if "GLM_JAX_NOTEBOOK" in path.read_text(encoding="utf-8")]  # others have one mode
FULL = [path for path in NOTEBOOKS if path.stem != "01_layer_norms_at_initialisation"]  # which trains for minutes
MACHINE_PATH = re.compile(
    r"(?<![\w.])/(tmp|work|root|home|Users|private|opt|usr|var)/|site-packages|\.ipynb_checkpoints"
)
FIGURES = ("image/png", "image/svg+xml")


def identity(path):
    return path.stem


def outputs(notebook):
    return [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]


def figures(notebook):
    return [output.data[kind] for output in outputs(notebook) for kind in FIGURES if kind in output.get("data", {})]


def check_figures(notebook):
    """Check that a notebook shows figures and that each is one."""
    found = figures(notebook)
    assert found
    for figure in found:
        assert figure.lstrip().startswith("<svg") or base64.b64decode(figure).startswith(b"\x89PNG")


def test_there_are_notebooks():
    assert NOTEBOOKS


def words(notebook):
    """Return what is shown in words and tables, cell by cell; SVG is our own text, other pictures are none."""
    shown = [output.get("data", {"text/plain": output.get("text", "")}) for output in outputs(notebook)]
    return [{kind: data[kind] for kind in sorted(data) if kind != "image/png"} for data in shown]


@pytest.mark.slow
@pytest.mark.parametrize("path", SMALL, ids=identity)
def test_a_notebook_runs_in_small_mode(path, monkeypatch):
    monkeypatch.setenv("GLM_JAX_NOTEBOOK", "small")
    notebook = nbformat.read(path, as_version=4)
    execute(notebook)
    check_figures(notebook)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


@pytest.mark.slow
@pytest.mark.parametrize("path", FULL, ids=identity)
def test_a_notebook_gives_what_is_committed(path, monkeypatch):
    """Its words and tables to the letter; of its figures the data, as fonts and layout are matplotlib's."""
    monkeypatch.delenv("GLM_JAX_NOTEBOOK", raising=False)
    committed = nbformat.read(path, as_version=4)
    recorded = json.loads(DATA.read_text(encoding="utf-8"))[path.stem]
    assert pictures(committed) == [figure["sha256"] for figure in recorded], "run tests/notebooks/figure_data.py"
    notebook = nbformat.read(path, as_version=4)
    drawn = execute(notebook, record=True)
    assert words(notebook) == words(committed)
    assert len(drawn) == len(recorded) > 0
    for place, (expected, found) in enumerate(zip(recorded, drawn, strict=True), 1):
        assert differences(expected["figure"], found["figure"], f"figure {place}") == []
    check_figures(notebook)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


def plot(
    number=2.0, bar=3.0, colour="red", label="seed", order=1, title="loss", note="here", name="run", tick="b", shade=0.5
):
    """Draw a figure with a line, a long line, a bar, an area, marks, an image and words."""
    figure = Figure()
    axes = figure.subplots()
    axes.plot([1.0, number, 3.0], [1.0, 4.0, np.nan], color=colour, label=label)
    axes.plot(np.linspace(0, 1, 50), np.sin(np.arange(50))[::order])
    axes.bar([0.0, 1.0], [bar, 1.0])
    axes.fill_between([0.0, 1.0], [0.0, bar])
    axes.scatter([number], [bar])
    axes.imshow([[0.0, shade], [1.0, 0.25]])
    axes.text(number, 1.0, note)
    axes.set_title(title, loc="left")
    axes.set_xticks([0.0, 1.0], ["a", tick])
    axes.legend()
    figure.suptitle(name)
    return figure_data(figure)


def test_a_change_of_what_a_figure_is_drawn_from_is_seen():
    whole = json.loads(json.dumps(plot()))
    assert differences(whole, plot()) == [] == differences(whole, plot(number=2.0 + 1e-9))
    changes = [{"number": 2.001}, {"bar": 3.001}, {"colour": "blue"}, {"label": "other"}, {"order": -1}]
    changes += [{"title": "other"}, {"note": "there"}, {"name": "other"}, {"tick": "c"}, {"shade": 0.501}]
    assert [change for change in changes if not differences(whole, plot(**change))] == []


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_a_committed_notebook_was_run_from_top_to_bottom_without_an_error(path):
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    counts = [cell.execution_count for cell in notebook.cells if cell.cell_type == "code"]
    assert counts == list(range(1, len(counts) + 1))
    assert {output.output_type for output in outputs(notebook)} <= {"execute_result", "display_data", "stream"}
    assert "stderr" not in {output.get("name") for output in outputs(notebook)}
    check_figures(notebook)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_a_committed_notebook_says_nothing_of_the_machine_that_ran_it(path):
    notebook = nbformat.read(path, as_version=4)
    for data in (output.get("data", {}) for output in outputs(notebook)):
        data.pop("image/png", None)  # base64 has slashes
    found = MACHINE_PATH.search(nbformat.writes(notebook))
    assert found is None, f"{path.name} holds {found}"
    assert notebook.metadata.kernelspec.name == "python3"
    assert set(notebook.metadata) <= {"kernelspec", "language_info"}
    assert not [cell.metadata for cell in notebook.cells if cell.metadata.get("execution")]  # times of the run


@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_a_notebook_tells_claims_measures_and_scale_apart(path):
    notebook = nbformat.read(path, as_version=4)
    prose = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown").lower()
    assert "claimed" in prose and "needs scale" in prose


@pytest.mark.parametrize("text", ["in /tmp/x", '"/opt/x/y"', "File /root/a.py", "lib/site-packages/jax", "/home/me/"])
def test_machine_paths_are_recognised(text):
    assert MACHINE_PATH.search(text)
    assert not MACHINE_PATH.search("glm_jax/model/residual.py, 24/8/4, runs/tmp/a, https://arxiv.org/abs/2203.00555")
