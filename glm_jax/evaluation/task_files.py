"""Task files in the form of the GLM-130B repository: one YAML file a task, read as it is."""

from __future__ import annotations

import dataclasses
import glob
import importlib
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from glm_jax.errors import UserError
from glm_jax.evaluation.rows import Reading

KINDS = ("mul", "gen", "lm")
METRICS = {"mul": ("Accuracy",), "gen": ("EM", "F1"), "lm": ("PPL",)}
KNOWN_METRICS = {
    "mul": ("Accuracy", "F1_mul", "Precision", "Recall"),
    "gen": ("EM", "F1", "Accuracy"),
    "lm": ("PPL", "BPB"),
}
STRATEGIES = ("BaseStrategy", "BeamSearchStrategy")
MODULES = {  # protocols, and the type that their files have
    "MMLU": "mul",
    "Cloze": "mul",
    "CrowsPairTask": "mul",
    "StereoSetTask": "mul",
    "BIGBench": "mul",
    "LAMBADA": "gen",
    "Pile": "lm",
}
GENERAL = {"MultiChoiceTask": "mul", "GenerationTask": "gen", "LanguageModelTask": "lm"}  # modules that change nothing
SUFFIXES = (".yaml", ".yml")
MOST_BYTES = 2**20  # of a task file


@dataclasses.dataclass(frozen=True)
class Task:
    """What a task file says.

    Attributes:
        file: the task file.
        name: of the task.
        kind: "mul" (choices), "gen" (generation) or "lm" (language modelling).
        path: of its data, below the data root.
        examples: of the examples of few-shot prompts, below the data root; empty: those of its data.
        module: the protocol that differs from the kind's own, a name of MODULES; or empty.
        metrics: names of measures.
        reading: how texts become rows.
        patterns: of each group, the pattern of its files; a single pattern is the group `all`.
        beams: of the search; 1 is greedy.
        length_penalty, no_repeat_ngram, min_tokens: of the search.
        limit: tokens of an answer.
        stride: tokens between two windows.
        ignored: keys that mean nothing here.
    """

    file: Path
    name: str
    kind: str
    path: str
    module: str = ""
    metrics: tuple[str, ...] = ()
    reading: Reading = Reading()
    patterns: tuple[tuple[str, str], ...] = (("all", "**/*.json*"),)
    beams: int = 1
    length_penalty: float = 1.0
    no_repeat_ngram: int = 3
    min_tokens: int = 0
    limit: int = 128
    stride: int = 256
    examples: str = ""
    ignored: tuple[str, ...] = ()

    def files(self, data: Path) -> dict[str, list[Path]]:
        """Return the files of each group below a data root.

        Raises:
            UserError: a pattern matches none.
        """
        root, found = data / self.path, dict[str, list[Path]]()
        for group, pattern in self.patterns:
            names = sorted(glob.glob(os.path.join(glob.escape(str(root)), pattern), recursive=True))
            found[group] = [Path(name) for name in names if os.path.isfile(name)]
            if not found[group]:
                raise UserError(f"{self.file}: file_pattern {pattern} matches no file below {root}: give the folder "
                                "that holds it with --data")  # fmt: skip
        return found

    def examples_file(self, data: Path, file: Path) -> Path | None:
        """Return the file that has the examples for a data file, under the same name; None for the data file itself.

        Raises:
            UserError: it is not there.
        """
        if not self.examples:
            return None
        found = data / self.examples / file.relative_to(data / self.path)
        if not found.is_file():
            raise UserError(f"{self.file}: few_shot_path has no file {found}: put the examples for {file} there")
        return found


class Value(NamedTuple):
    """A value of a task file and its line."""

    value: object
    line: int


class Fields:
    """The fields of a task file, with `-` in their names as `_`; messages name file, line and field."""

    def __init__(self, file: Path, values: Mapping[str, Value]) -> None:
        self._file, self._values, self._read = file, values, set[str]()

    def fail(self, name: str, problem: str) -> UserError:
        """Return the error that a field has a problem."""
        line = self._values[name].line if name in self._values else 1
        return UserError(f"{self._file}, line {line}: {name} {problem}")

    def take(self, name: str, default: Any, right: Callable[[Any], bool], form: str) -> Any:  # any value of YAML
        """Return a field that must be `right`, or its default; None has no default."""
        self._read.add(name)
        if name not in self._values:
            if default is None:
                raise self.fail(name, "is missing: add it")
            return default
        value = self._values[name].value
        if not right(value):
            raise self.fail(name, f"is {str(value)[:60]!r}: it must be {form}")
        return value

    def text(self, name: str, default: str | None = None) -> str:
        """Return a field that is text."""
        return self.take(name, default, lambda value: isinstance(value, str) and bool(value), "text")

    def flag(self, name: str) -> bool:
        """Return a field that is true or false."""
        return self.take(name, False, lambda value: isinstance(value, bool), "true or false")

    def count(self, name: str, default: int, least: int = 1) -> int:
        """Return a field that is a whole number."""
        right = lambda value: type(value) is int and least <= value < 2**31  # noqa: E731
        return self.take(name, default, right, f"a whole number, at least {least}")

    def chosen(self, name: str, default: str | None, known: Sequence[str]) -> str:
        """Return a field that is one of several words."""
        return self.take(name, default, lambda value: value in known, f"one of {', '.join(known)}")

    def others(self) -> tuple[str, ...]:
        """Return the fields that nobody asked for."""
        return tuple(name for name in self._values if name not in self._read)


def read(file: Path) -> Task:
    """Read a task file.

    Raises:
        UserError: it cannot be read, or a field is missing or has a wrong value; the message names the line.
    """
    fields = Fields(file, _values(file))
    name, kind = fields.text("name"), fields.chosen("type", None, [*KINDS, "other"])
    module = _module(fields, kind)
    if kind == "other":
        raise fields.fail("type", f"is 'other': it must be one of {', '.join(KINDS)}")
    known = KNOWN_METRICS[kind]
    metrics = fields.take(
        "metrics",
        METRICS[kind],
        lambda value: isinstance(value, list) and bool(value) and all(one in known for one in value),
        f"a list of {', '.join(known)}",
    )
    gmask, causal = fields.flag("use_task_mask"), fields.flag("unidirectional")
    longest, counts = fields.count("max_seq_length", 2048, 4), fields.flag("use_multitask_encoding")
    if causal and not gmask:
        raise fields.fail("unidirectional", "needs use_task_mask: set it, too, as text is read after [gMASK] alone")
    fields.count("micro_batch_size", 1)  # batches have the size that fits
    reading = Reading(gmask, causal, longest, counts, kind == "mul" and fields.flag("causal_context"))
    task = Task(
        file, name, kind, fields.text("path"), module, tuple(metrics), reading, _patterns(fields),
        examples=fields.text("few_shot_path", "") if kind != "lm" else "",
    )  # fmt: skip
    if kind == "gen":
        task = _generation(fields, task)
    elif kind == "lm":
        task = dataclasses.replace(task, stride=fields.count("generation_length", 256))
    return dataclasses.replace(task, ignored=fields.others())


def _module(fields: Fields, kind: str) -> str:
    name = fields.text("module", " ").rpartition(".")[2].strip()
    if not name or GENERAL.get(name) == kind:
        return ""
    if name not in MODULES:
        raise fields.fail("module", f"names {name}, which is unknown: it must be one of {', '.join(MODULES)}")
    if MODULES[name] != kind:
        raise fields.fail("module", f"names {name}, whose type is {MODULES[name]}, not {kind}")
    return name


def _patterns(fields: Fields) -> tuple[tuple[str, str], ...]:
    def right(value: object) -> bool:
        if isinstance(value, Mapping):
            return bool(value) and all(isinstance(one, str) and one for one in [*value, *value.values()])
        return isinstance(value, str) and bool(value)

    form = "a pattern such as **/*.jsonl, or a mapping of groups to patterns"
    given = fields.take("file_pattern", "**/*.json*", right, form)
    return tuple(given.items()) if isinstance(given, Mapping) else (("all", given),)


def _generation(fields: Fields, task: Task) -> Task:
    strategy = fields.chosen("sampling_strategy", "BaseStrategy", STRATEGIES)
    beams = fields.count("num_beams", 4)
    number = lambda value: isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 10  # noqa: E731
    return dataclasses.replace(
        task,
        beams=beams if strategy == "BeamSearchStrategy" else 1,
        length_penalty=float(fields.take("length_penalty", 1.0, number, "a number between -10 and 10")),
        no_repeat_ngram=fields.count("no_repeat_ngram_size", 3, 0),
        min_tokens=fields.count("min_gen_length", 0, 0),
        limit=fields.count("max_gen_length", 128),
    )


def _values(file: Path) -> dict[str, Value]:
    """Return the values of a YAML file with their lines."""
    try:
        yaml = importlib.import_module("yaml")
    except ImportError:
        raise UserError("task files need the package PyYAML: pip install -e '.[evaluation]'") from None
    try:
        content = file.read_bytes()
        if len(content) > MOST_BYTES:
            raise UserError(f"{file} has over {MOST_BYTES:,} bytes: it is no task file")
        node = yaml.compose(content.decode("utf-8"), yaml.SafeLoader)
        if not isinstance(node, yaml.MappingNode):
            raise UserError(f"{file}, line 1: a task file is a mapping of fields: write name, type and path")
        loader = yaml.SafeLoader("")
        found = dict[str, Value]()
        for key, value in node.value:
            name, line = str(key.value).replace("-", "_"), key.start_mark.line + 1
            if name in found:
                raise UserError(f"{file}, line {line}: {name} is given twice: leave one of them out")
            found[name] = Value(loader.construct_object(value, deep=True), line)
    except OSError as error:
        raise UserError(f"{file} cannot be read ({error.strerror}): name a task file") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        mark = getattr(error, "problem_mark", None)
        where = f", line {mark.line + 1}" if mark else ""
        said = getattr(error, "problem", None) or (str(error).splitlines() or [type(error).__name__])[0][:100]
        raise UserError(f"{file}{where} is not valid YAML ({said})") from None
    return found


def find(places: Sequence[str | Path | UserError]) -> list[Path | UserError]:
    """Return the task files of files and folders, in order; an error in the place of what is not there."""
    found = list[Path | UserError]()
    for given in places:
        if isinstance(given, UserError):
            found.append(given)
            continue
        place = Path(given)
        if place.is_dir():
            inside = sorted(file for file in place.rglob("*") if file.suffix in SUFFIXES and file.is_file())
            found += inside or [UserError(f"--tasks {place} holds no task file (.yaml): name another folder")]
        elif place.is_file():
            found.append(place)
        else:
            found.append(UserError(f"--tasks {place} is neither a task file nor a folder of them: check the name"))
    return found
