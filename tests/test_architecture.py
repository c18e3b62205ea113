"""The stations that docs/architecture.md names: each one exists, and calls the next."""

import ast
import importlib
import inspect
import re
import textwrap
from pathlib import Path
from typing import Any

import pytest

PAGE = Path(__file__).parents[1] / "docs" / "architecture.md"
WAYS = dict(re.findall(r"^### (.*?)\n(.*?)(?=^### |\Z)", PAGE.read_text(encoding="utf-8"), flags=re.M | re.S))


def station(name: str) -> Any:
    """Return the object that a dotted name refers to."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            found = importlib.import_module(".".join(parts[:cut]))
        except ModuleNotFoundError:
            continue
        for part in parts[cut:]:
            found = getattr(found, part)
        return found
    raise AssertionError(f"no module of {name} can be imported")


def called(function: Any) -> set[str]:
    """Return the last names of everything that a function, or a class's methods, call or pass on."""
    tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name)}
    return names | {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}


def test_there_are_four_ways() -> None:
    assert [title.split(":")[0] for title in WAYS] == ["A row", "A key", "A parameter", "A prompt"]


@pytest.mark.parametrize("title", WAYS)
def test_each_station_calls_the_next(title: str) -> None:
    numbered = re.findall(r"^(\d+)\. `(.*?)`", WAYS[title], flags=re.M)
    names = [name for _, name in numbered]
    assert [int(number) for number, _ in numbered] == list(range(1, len(names) + 1)) and 3 < len(names) <= 7
    stations = [station(name) for name in names]
    for name, one, following in zip(names, stations, names[1:], strict=False):
        assert following.rsplit(".", 1)[1] in called(one), f"{name} does not call {following}"
