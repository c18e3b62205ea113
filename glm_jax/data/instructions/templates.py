"""Templates that turn a record into a prompt and its answer, written in Jinja as "prompt ||| answer".

Two forms are read: PromptSource's templates.yaml (2,085 templates of 179 data sets, used in GLM-130B's instruction
training, section 2.3 of arXiv 2210.02414), and plain .jinja files, the form in which the paper's appendix C.2 gives its
own for DeepStruct's tasks. Templates are other people's programs: render.py runs them, within limits.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from glm_jax.data.instructions.render import FAILS, Answer, Refused, Render, answers, missing
from glm_jax.errors import UserError
from glm_jax.storage.files import open_regular

LONGEST_TEMPLATE = 100_000  # characters
LARGEST_FILE = 1_000_000  # bytes
DEEPEST_FLOW = 20  # brackets within brackets
NULLS = ("", "~", "null", "Null", "NULL")  # how YAML writes nothing


class Template:
    """One prompt.

    Attributes:
        name: for messages.
        jinja, answer_choices: what it was compiled from.
    """

    def __init__(self, name: str, jinja: str, answer_choices: str | None = None) -> None:
        """Check that a template compiles.

        Args:
            name: for messages.
            jinja: "prompt ||| answer" over the record's fields and `answer_choices`. Hyphens in the names of fields
                are written as underscores.
            answer_choices: Jinja that renders the possible answers, separated by |||. The template sees a list.

        Raises:
            UserError: it does not parse, is too long, or jinja2 is not installed.
        """
        self.name, self.jinja, self.answer_choices = name, jinja, answer_choices
        if len(jinja) + len(answer_choices or "") > LONGEST_TEMPLATE:
            raise UserError(f"template {name} has over {LONGEST_TEMPLATE:,} characters: shorten it")
        found = self._answer(None, 0)
        if isinstance(found, Refused):
            raise UserError(f"{found.message}{': it does not parse, fix it' * (found.reason == FAILS)}")

    def job(self, record: Mapping[str, object] | None, seed: int) -> Render:
        """Return the job for `render.answers`; without a record, it only compiles."""
        return Render(self.name, self.jinja, self.answer_choices, record, seed)

    def _answer(self, record: Mapping[str, object] | None, seed: int) -> Answer:
        ((_, answer),) = answers([(None, self.job(record, seed))])
        return answer

    def render(self, record: Mapping[str, object], seed: int = 0) -> tuple[str, str] | None:
        """Return (prompt, answer), stripped, or None if the template has nothing to ask about the record.

        Args:
            record: the fields, JSON values.
            seed: of the template's random choices.

        Raises:
            UserError: the template fails on the record, for example because a field is missing, exceeds its budget of
                time, memory or output, or gives anything else than one prompt and one answer.
        """
        answer = self._answer(record, seed)
        if isinstance(answer, Refused):
            raise UserError(answer.message)
        return answer


def read_templates(path: Path) -> list[Template]:
    """Read the templates of one data set.

    Args:
        path: PromptSource's templates.yaml, a .jinja file, or a directory that holds either.

    Raises:
        UserError: there are no templates, or one does not parse.
    """
    files = [path]
    if path.is_dir():
        files = [path / "templates.yaml"] if (path / "templates.yaml").is_file() else sorted(path.glob("*.jinja"))
    templates: list[Template] = []
    for file in files:
        text = _read(file)
        templates += _from_yaml(file, text) if file.suffix in (".yaml", ".yml") else [Template(file.stem, text)]
    if not templates:
        raise UserError(f"{path} holds no templates: give a templates.yaml or .jinja files")
    return templates


def _read(file: Path) -> str:
    try:
        with open_regular(file) as stream:
            content = stream.read(LARGEST_FILE + 1)
        if len(content) > LARGEST_FILE:
            raise UserError(f"the templates {file} have over {LARGEST_FILE:,} bytes: split or shorten them")
        return content.decode("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read the templates {file}: {error}") from None


def _from_yaml(file: Path, text: str) -> list[Template]:
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise missing("PyYAML") from None

    class Loader(yaml.BaseLoader):
        """Reads mappings, lists and strings alone, whatever their tags: it neither constructs objects nor merges."""

        def construct_scalar(self, node: Any) -> str | None:  # a yaml.Node: PyYAML is imported late
            return None if node.style is None and node.value in NULLS else super().construct_scalar(node)

        def fetch_flow_collection_start(self, token: Any) -> None:  # PyYAML has no types
            if self.flow_level == DEEPEST_FLOW:  # the scanner's time for each token grows with the depth
                raise RecursionError
            super().fetch_flow_collection_start(token)

    try:
        entries = list(yaml.load(text, Loader)["templates"].values())  # noqa: S506 (a BaseLoader)
        found = [(entry["name"], entry["jinja"], entry["answer_choices"]) for entry in entries]
    except RecursionError:
        raise UserError(f"{file} is not a PromptSource file (it is nested too deeply)") from None
    except (yaml.YAMLError, LookupError, TypeError, AttributeError, ValueError) as error:
        said = (str(error).splitlines() or [type(error).__name__])[0][:200]
        raise UserError(f"{file} is not a PromptSource file ({said})") from None
    for name, jinja, choices in found:
        if not isinstance(name, str) or not isinstance(jinja, str) or not isinstance(choices, str | None):
            raise UserError(f"{file} is not a PromptSource file (name, jinja and answer_choices must be text)")
    return [Template(f"{file}: {name}", jinja, choices) for name, jinja, choices in found]
