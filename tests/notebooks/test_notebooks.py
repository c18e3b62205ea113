"""Every notebook runs in its small mode; what is committed is a clean run of its full mode."""

import base64
import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
CELL_TIMEOUT = 900  # seconds, on a busy machine, too
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


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=identity)
def test_a_notebook_runs_in_small_mode(path, monkeypatch):
    monkeypatch.setenv("GLM_JAX_NOTEBOOK", "small")
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(FOLDER)}}
    NotebookClient(notebook, timeout=CELL_TIMEOUT, kernel_name="python3", resources=resources).execute()
    check_figures(notebook)
    assert not [output for output in outputs(notebook) if output.output_type == "error"]


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
