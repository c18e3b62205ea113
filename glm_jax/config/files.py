"""Run an experiment's file. Whatever it raises becomes one line with the file, the failing line and the reason."""

from __future__ import annotations

import contextlib
import runpy
import traceback
from collections.abc import Generator, Mapping
from pathlib import Path
from types import FunctionType

from glm_jax.config.fields import is_mapping, plain, shown
from glm_jax.errors import UserError


def config(path: Path) -> Mapping[str, object]:
    """Return what `get_config()` of an experiment's file returns, as nested dicts.

    Raises:
        UserError: the file cannot be run, or has no `get_config()` that returns a config.
    """
    defined = read(path)
    returned = call(path, defined, "get_config", "write one that returns default_config() with its changes")
    with _explained(path, defined.get("get_config")):  # a config inside itself is refused only now
        values = plain(returned)
    if not is_mapping(values):
        raise UserError(f"{_place(path, defined.get('get_config'))}: get_config() returns {shown(returned)}, it must "
                        "return default_config() with its changes")  # fmt: skip
    return values


def read(path: Path) -> Mapping[str, object]:
    """Run an experiment's file and return what it defines, by name.

    Raises:
        UserError: it cannot be read or run.
    """
    with _explained(path):
        return runpy.run_path(str(path))


def call(path: Path, defined: Mapping[str, object], name: str, otherwise: str) -> object:
    """Call a function without arguments that an experiment's file defines.

    Args:
        path: the file.
        defined: the result of `read`.
        name: of the function.
        otherwise: the advice if the file has no such function.

    Raises:
        UserError: there is none, it needs arguments, or it fails.
    """
    function = defined.get(name)
    if not callable(function):
        raise UserError(f"{path} has no {name}(): {otherwise}")
    with _explained(path, function):
        return function()


@contextlib.contextmanager
def _explained(path: Path, function: object = None) -> Generator[None]:
    """Turn anything that a file's code raises into a UserError; without a line of its own, `function`'s is named."""
    try:
        yield
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the user's code may raise anything, such as SystemExit
        if isinstance(error, OSError) and error.filename == str(path):
            raise UserError(f"{path} cannot be read ({error.strerror}): check --config") from error
        line = _line(path, error)
        raise UserError(f"{f'{path}, line {line}' if line else _place(path, function)}: {_reason(error)}") from error


def _line(path: Path, error: BaseException) -> int | None:
    """Return the line of the file that cannot be parsed, or the innermost one that was running."""
    if isinstance(error, SyntaxError) and error.filename in (str(path), None):
        if error.lineno is None:  # Python does not say where a null character is
            return path.read_bytes().partition(b"\0")[0].count(b"\n") + 1
        return error.lineno
    lines = [line for frame, line in traceback.walk_tb(error.__traceback__) if frame.f_code.co_filename == str(path)]
    return lines[-1] if lines else None


def _place(path: Path, function: object) -> str:
    if isinstance(function, FunctionType) and function.__code__.co_filename == str(path):
        return f"{path}, line {function.__code__.co_firstlineno}"
    return str(path)


def _reason(error: BaseException) -> str:
    """Return an exception's type and text in one line."""
    try:
        text = " ".join((error.msg if isinstance(error, SyntaxError) else str(error)).split())
    except Exception:  # the text is the work of the user's code, too
        text = ""
    if isinstance(error, UserError):
        return text
    return ": ".join(filter(None, (type(error).__name__, text)))
