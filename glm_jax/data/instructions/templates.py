"""Templates that turn a record into a prompt and its answer, written in Jinja as "prompt ||| answer".

Two forms are read: PromptSource's templates.yaml (2,085 templates of 179 data sets, used in GLM-130B's instruction
training, section 2.3 of arXiv 2210.02414), and plain .jinja files, the form in which the paper's appendix C.2 gives its
own for DeepStruct's tasks. Templates are other people's programs: they run in Jinja's sandbox and draw from a given
seed.
"""

from __future__ import annotations

import functools
import importlib
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, TypeVar

from glm_jax.errors import UserError

if TYPE_CHECKING:
    from jinja2.runtime import Context
    from jinja2.sandbox import SandboxedEnvironment

Item = TypeVar("Item")

SEPARATOR = "|||"
PROTECTED = "\ue000|\ue000|\ue000"  # stands for a separator in a record's own text while the template runs
DRAWS = "_draws"  # the variable that holds the render's random generator


def _import_package(package: str, module: str) -> ModuleType:
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"instructions need the package {package}: pip install -e '.[instructions]'") from None


@functools.cache
def _environment() -> SandboxedEnvironment:
    """Return the sandbox, with the filters that PromptSource's templates use. A missing field is an error in it."""
    jinja2 = _import_package("jinja2", "jinja2")
    sandbox = _import_package("jinja2", "jinja2.sandbox")
    environment: SandboxedEnvironment = sandbox.SandboxedEnvironment(undefined=jinja2.StrictUndefined)

    @jinja2.pass_context
    def choice(context: Context, choices: Sequence[Item]) -> Item:
        return context[DRAWS].choice(list(choices))

    environment.filters["choice"] = environment.filters["random"] = choice
    environment.filters["most_frequent"] = most_frequent
    environment.globals["zip"] = zip
    return environment


def most_frequent(items: Sequence[Item]) -> list[Item]:
    """Return the items that occur as often as the most frequent one, in order; empty if there are none."""
    counts = Counter(items)
    return [item for item, count in counts.items() if count == max(counts.values())]


class Template:
    """One prompt.

    Attributes:
        name: for messages.
        jinja, answer_choices: what it was compiled from.
    """

    def __init__(self, name: str, jinja: str, answer_choices: str | None = None) -> None:
        """Compile a template.

        Args:
            name: for messages.
            jinja: "prompt ||| answer" over the record's fields and `answer_choices`.
            answer_choices: Jinja that renders the possible answers, separated by |||. The template sees a list.

        Raises:
            UserError: it does not parse, or jinja2 is not installed.
        """
        self.name, self.jinja, self.answer_choices = name, jinja, answer_choices
        environment = _environment()
        template_error = _import_package("jinja2", "jinja2").TemplateError
        self._errors = (template_error, TypeError, ValueError, LookupError, AttributeError, ArithmeticError)
        try:
            self._prompt = environment.from_string(jinja)
            self._choices = environment.from_string(answer_choices) if answer_choices else None
        except self._errors as error:
            raise UserError(f"template {name} does not parse ({error}): fix it") from None

    def render(self, record: Mapping[str, object], seed: int = 0) -> tuple[str, str] | None:
        """Return (prompt, answer), stripped, or None if the template has nothing to ask about the record.

        Args:
            record: the fields, JSON values.
            seed: of the template's random choices.

        Raises:
            UserError: the template fails on the record, for example because a field is missing.
        """
        fields = {name: _protect(value) for name, value in record.items()}
        fields[DRAWS] = random.Random(seed)
        try:
            if self._choices is not None:
                fields["answer_choices"] = [part.strip() for part in self._choices.render(fields).split(SEPARATOR)]
            parts = [_restore(part) for part in self._prompt.render(fields).split(SEPARATOR)]
        except self._errors as error:
            raise UserError(f"template {self.name} fails ({error}): its records have {', '.join(record)}") from None
        return (parts[0], parts[1]) if len(parts) == 2 and parts[1] else None


def _protect(value: object) -> object:
    """Hide separators in any string of a JSON value."""
    if isinstance(value, str):
        return value.replace(SEPARATOR, PROTECTED)
    if isinstance(value, Mapping):
        return {name: _protect(part) for name, part in value.items()}
    return [_protect(part) for part in value] if isinstance(value, list | tuple) else value


def _restore(part: str) -> str:
    return part.replace(PROTECTED, SEPARATOR).strip()


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
        try:
            text = file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"cannot read the templates {file}: {error}") from None
        templates += _from_yaml(file, text) if file.suffix in (".yaml", ".yml") else [Template(file.stem, text)]
    if not templates:
        raise UserError(f"{path} holds no templates: give a templates.yaml or .jinja files")
    return templates


def _from_yaml(file: Path, text: str) -> list[Template]:
    yaml = _import_package("PyYAML", "yaml")

    class Loader(yaml.SafeLoader):
        """Reads tagged objects as plain mappings, so that a file cannot construct anything else."""

    Loader.add_multi_constructor("!", lambda loader, _tag, node: loader.construct_mapping(node, deep=True))
    try:
        entries = yaml.load(text, Loader)["templates"].values()  # noqa: S506 (a SafeLoader)
        return [Template(f"{file}: {entry['name']}", entry["jinja"], entry["answer_choices"]) for entry in entries]
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{file} is not a PromptSource file ({str(error).splitlines()[0]})") from None
