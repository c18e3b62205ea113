"""Experiment files that fail in many ways: one line each, with the file, the failing line and the reason."""

from pathlib import Path

import pytest

from glm_jax.cli import main
from glm_jax.config import files
from glm_jax.errors import UserError

IMPORTS = "from glm_jax.config import default_config, source\n"
START = IMPORTS + "def get_config():\n    config = default_config()\n"  # 3 lines

FAILING: list[tuple[str | bytes, int | None, str]] = [
    (START + "    config.train.steps = 1 // 0\n    return config\n", 4, "ZeroDivisionError: "),
    ("import sys\n\nsys.exit(3)\n", 3, "SystemExit: 3"),
    ("raise KeyError\n", 1, "KeyError"),
    (START + "    raise ValueError('two\\nlines')\n", 4, "ValueError: two lines"),
    ("def f():\n    return f()\n\nf()\n", 2, "RecursionError: "),
    (START + "    config.model.nothing.x = 4\n", 4, "AttributeError: "),
    (START + "    config.model.num_layers = 'four'\n", 4, "TypeError: "),
    ("x = 1\ny = (\n", 2, "SyntaxError: "),
    ("x = 1\n\n  y = 2\n", 3, "IndentationError: "),
    ("import no_such_module\n", 1, "ModuleNotFoundError: No module named"),
    ("from glm_jax.config import nothing\n", 1, "ImportError: "),
    (b"x = 1\ny = 'caf\xe9'\n", 2, "SyntaxError: "),
    (b"x = 1\ny\0 = 2\n", 2, "SyntaxError: "),
    ("class Odd(Exception):\n    def __str__(self):\n        raise self\n\nraise Odd\n", 5, "Odd"),
    ("class Odd(BaseException): pass\nraise Odd('x')\n", 2, "Odd: x"),
    ("def get_config(size):\n    return size\n", 1, "TypeError: "),
    ("assert False, 'no'\ndef get_config(): pass\n", 1, "AssertionError: no"),
    ("open('/nowhere/at/all')\n", 1, "FileNotFoundError: "),
    (START, 2, "get_config() returns None, it must return default_config()"),
    ("\ndef get_config():\n    return [1] * 9999\n", 2, "get_config() returns [1, 1,"),
    ("def get_config():\n    return {1: 2}\n", 1, "get_config() returns {1: 2}"),
    (START + "    config.unlock()\n    config.a = config\n    return config\n", 2, "RecursionError"),
    (START + "    config.seed = 3\n    return config.model.nothing\n", 5, "AttributeError: "),
    ("import json\ndef get_config():\n    return json.loads('{')\n", 3, "JSONDecodeError: "),
    ("get_config = 5\n", None, "has no get_config(): "),
    ("", None, "has no get_config(): "),
    ("# coding: nonsense\n", None, "SyntaxError: unknown encoding"),
]


@pytest.mark.parametrize("content, line, said", FAILING)
def test_a_file_that_fails_is_one_line_with_its_place(
    content: str | bytes, line: int | None, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "mine.py"
    file.write_bytes(content.encode() if isinstance(content, str) else content)
    assert main.main(["config", "show", f"--config={file}"]) == 2
    output, errors = capsys.readouterr()
    place = f"error: {file}, line {line}: " if line else f"error: {file}"
    assert output == "" and errors.count("\n") == 1 and len(errors) < 600
    assert errors.startswith(place) and said in errors


@pytest.mark.parametrize("where", ["seed", "model", "train.wandb", "data.sources", "interventions", "data.weights"])
def test_a_value_of_any_type_is_one_line(where: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """No value of an experiment's file makes `resolve` fail in another way than with a line that names the key."""
    values = ("None", "object()", "[1, [2]]", "{1: 2}", "{'x': {}}", "10**5000", "float('nan')", "b'x'", "'\\ud800'",
              "(('a', 1),)", "((1, {'x': {'y': 3}}),)", "type('T', (), {'__repr__': lambda self: 1})()", "{''}",
              "[default_config()]")  # fmt: skip
    for value in values:
        file = tmp_path / "mine.py"
        file.write_text(
            IMPORTS + "def get_config():\n    values = default_config().to_dict()\n"
            f"    section = values\n    *path, last = {where.split('.')!r}\n"
            f"    for name in path:\n        section = section[name]\n    section[last] = {value}\n    return values\n"
        )
        code = main.main(["config", "show", f"--config={file}"])
        output, errors = capsys.readouterr()
        assert (code, output) == (2, "") and errors.count("\n") == 1 and (where in errors or "x.y" in errors), value


def test_the_line_is_that_of_the_file_and_not_of_what_it_calls(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("import json\n\ndef f():\n    return json.loads('[')\n\ndef get_config():\n    return f()\n")
    with pytest.raises(UserError, match=r"mine\.py, line 4: JSONDecodeError: "):
        files.config(file)


def test_an_interrupt_is_no_fault_of_the_file(tmp_path: Path) -> None:
    file = tmp_path / "mine.py"
    file.write_text("raise KeyboardInterrupt\n")
    with pytest.raises(KeyboardInterrupt):
        files.config(file)


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.py cannot be read \(No such file or directory\): check --config$"):
        files.config(tmp_path / "nowhere.py")
