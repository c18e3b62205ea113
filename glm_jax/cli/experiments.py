"""Find experiments by name, from any directory: next to an editable install, or where a wheel puts them."""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from glm_jax.config import Config, Experiment, files, resolve
from glm_jax.config.fields import closest
from glm_jax.errors import UserError

FOLDERS = (Path(__file__).parents[2] / "experiments", Path(sys.prefix) / "share" / "glm_jax" / "experiments")


def folder() -> Path | None:
    """Return the folder of the experiments that come with the package, or None if there is none."""
    return next((path for path in FOLDERS if (path / "quickstart.py").is_file()), None)


def summaries() -> Iterator[tuple[str, str]]:
    """Yield the name of every experiment and the first line of its docstring."""
    root = folder()
    for path in sorted(root.rglob("*.py")) if root else []:
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        yield path.relative_to(root or path).with_suffix("").as_posix(), docstring.partition("\n")[0]


def find(name: str | Path) -> Path:
    """Return the file of an experiment, given its path or its name.

    Raises:
        UserError: there is none.
    """
    root, file = folder(), Path(os.path.expanduser(name))
    parts = [part for part in file.parts if part != "experiments"]
    is_file = os.path.isfile(file)
    if is_file and (file.is_absolute() or file.suffix or len(file.parts) > 1):
        return file
    if root is not None and parts and os.path.isfile(inside := root / Path(*parts).with_suffix(".py")):
        return inside
    if is_file:
        return file
    known = [found for found, _ in summaries()]
    raise UserError(f"there is no experiment {name}: {closest(str(name), known, 'config list')}")


def resolved(experiment: str | Path | Config | Experiment) -> Experiment:
    """Return the resolved experiment, given its name, its file, or the result of its `get_config()`.

    Raises:
        UserError: there is no such file, it cannot be run, or its config is not valid.
    """
    if isinstance(experiment, Experiment):
        return experiment
    if not isinstance(experiment, str | Path):
        return resolve(experiment)
    return resolve(files.config(find(experiment)))
