"""Find experiments by name, from any directory: next to an editable install, or where a wheel puts them."""

from __future__ import annotations

import ast
import runpy
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from glm_jax.config import Config, Experiment, resolve
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


def with_paths(arguments: Sequence[str]) -> list[str]:
    """Return a command's arguments, with the experiment that `--config` names replaced by its path; paths stay."""
    found = list(arguments)
    for place, argument in enumerate(found):
        if argument.startswith("--config="):
            found[place] = f"--config={_path(argument.removeprefix('--config='))}"
        elif argument == "--config" and place + 1 < len(found):
            found[place + 1] = _path(found[place + 1])
    return found


def _path(name: str) -> str:
    root, file = folder(), Path(name)
    parts = [part for part in file.parts if part != "experiments"]
    a_path = file.is_absolute() or (file.is_file() and (file.suffix or len(file.parts) > 1))
    if root is None or a_path or not parts:
        return name
    inside = root / Path(*parts).with_suffix(".py")
    return str(inside) if inside.is_file() else name


def resolved(experiment: str | Path | Config | Experiment) -> Experiment:
    """Return the resolved experiment, given its name, its file, or the result of its `get_config()`.

    Raises:
        UserError: there is no such file, it cannot be run, or its config is not valid.
    """
    if isinstance(experiment, Experiment):
        return experiment
    if not isinstance(experiment, str | Path):
        return resolve(experiment)
    path = Path(_path(str(experiment)))
    if not path.is_file():
        known = [name for name, _ in summaries()]
        raise UserError(f"there is no experiment {experiment}: {closest(str(experiment), known, 'config list')}")
    try:
        config = runpy.run_path(str(path))["get_config"]()
    except (OSError, SyntaxError, ImportError, TypeError, ValueError, NameError, AttributeError, KeyError) as error:
        raise UserError(f"the experiment {path} cannot be loaded: {type(error).__name__}: {error}") from error
    return resolve(config)
