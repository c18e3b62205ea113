"""Tasks of lm-eval (0.4.13 and later): its prompts, filters and measures around what our model responds.

Import it only where lm-eval is used: that takes seconds.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import io
import itertools
import json
import logging
import random
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from lm_eval.api.instance import Instance
from lm_eval.api.metrics import bits_per_byte, mean, perplexity, weighted_perplexity
from lm_eval.api.model import LM
from lm_eval.api.task import Task as Definition
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager

from glm_jax.config.fields import closest
from glm_jax.errors import UserError
from glm_jax.evaluation import task_files
from glm_jax.evaluation.few_shot import Shots
from glm_jax.evaluation.lm_eval_requests import SEED, TYPES, Reader, Requests, Response
from glm_jax.evaluation.run import Failure, Part, Plan
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.work import Batches, Columns, Example, Result, Work

T = TypeVar("T")
UNABLE = {
    "UNSAFE_CODE": "runs code that the model writes: use `lm_eval --model glm-jax --confirm_run_unsafe_code`",
    "MULTIMODAL": "has images or sounds, which GLM does not read",
}
# How a measure follows from its values of items; the others, such as F1, need all items at once.
COMBINED: Mapping[Callable[..., float], str] = {
    mean: "mean",
    perplexity: "perplexity",
    weighted_perplexity: "weighted_perplexity",
    bits_per_byte: "bits_per_byte",
}
WHOLE = "whole"  # the kind of those others


class Answered(LM):
    """A model that has responded already."""

    def __init__(self, responses: Mapping[str, list[Any]]) -> None:
        """Take the responses of each type of request, in order."""
        super().__init__()
        self._responses = responses

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Return what was responded."""
        return self._responses["loglikelihood"]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """Return what was responded."""
        return self._responses["loglikelihood_rolling"]

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        """Return what was responded."""
        return self._responses["generate_until"]


OWN = Shots(seed=SEED)  # as many examples as a task asks for


class Harness(Work):
    """A task of lm-eval; its units are requests. The evaluator of lm-eval turns responses into measures.

    Attributes:
        digest: of the requests.
    """

    def __init__(self, reader: Reader, task: Definition) -> None:
        """Take a task whose requests are built.

        Raises:
            UserError: a request has no room in the model's rows, or asks for what the model cannot do.
        """
        self._task, self._evaluated = task, dict[str, Any]()
        asked = dict[str, list[Instance]]()  # in the order in which lm-eval asks
        for one in task.instances:
            asked.setdefault(one.request_type, []).extend([one] * (one.repeats or 1))
        self._requests: dict[str, Requests] = {
            kind: TYPES[kind](reader, [one.args for one in some]) for kind, some in asked.items()
        }
        self._ends = [*itertools.accumulate(map(len, asked.values()), initial=0)]
        text = json.dumps([one.args for some in asked.values() for one in some], default=str)
        self.digest = hashlib.sha256(text.encode()).digest()
        self.count, self.items = self._ends[-1], len({one.doc_id for one in task.instances})
        cut = {one.doc_id for kind, some in asked.items()
               for one, short in zip(some, self._requests[kind].cut, strict=True) if short}  # fmt: skip
        self.truncated = len(cut)
        self.shots = int(task.get_config("num_fewshot"))
        self.notes = tuple(note for some in self._requests.values() for note in some.notes)
        if cut:
            self.notes += (f"{len(cut)} of {self.items} items keep only the end of a context: the model's rows hold "
                           f"{reader.room} tokens",)  # fmt: skip

    def _parts(self) -> Iterator[tuple[str, Requests, range]]:
        """Yield each type of request, its requests, and their numbers."""
        for (kind, some), ends in zip(self._requests.items(), itertools.pairwise(self._ends), strict=True):
            yield kind, some, range(*ends)

    def run(self, numbers: Sequence[int]) -> Batches:
        """Respond to requests."""
        for _, some, inside in self._parts():
            for batch in some.run([number - inside.start for number in numbers if number in inside]):
                yield [(inside.start + number, {"response": response}) for number, response in batch]

    def texts(self) -> list[list[str]]:
        """Return what each document says, without few-shot examples: one text, or one for each of its choices."""
        found = dict[int | None, list[str]]()
        for one in self._task.instances:
            context, *continuation = one.args
            question = self._task.doc_to_text(one.doc)
            if one.request_type == "loglikelihood_rolling" or not isinstance(question, str):
                question = context
            answer = continuation[0] if one.request_type == "loglikelihood" else ""
            found.setdefault(one.doc_id, []).append(f"{question}{answer}")
        return list(found.values())

    def tokens(self, number: int) -> int:
        """Return the tokens of a request."""
        return next(some.tokens(number - inside.start) for _, some, inside in self._parts() if number in inside)

    def _evaluate(self, results: Sequence[Result]) -> dict[str, Any]:
        """Return what lm-eval makes of the responses; a task keeps them, so that it is asked once.

        Raises:
            UserError: it fails.
        """
        if not self._evaluated:
            responses = {kind: [_response(results[number]["response"]) for number in inside]
                         for kind, _, inside in self._parts()}  # fmt: skip
            self._task.build_all_requests = lambda **_: None  # pyright: ignore[reportAttributeAccessIssue] (they are)
            only: Any = {"tasks": {self._task.task_name: self._task}}
            found: Any = guarded(lambda: evaluate(Answered(responses), only, bootstrap_iters=0))
            self._evaluated = {key: found[key][self._task.task_name] for key in ("results", "samples")}
        return self._evaluated

    def _values(self, results: Sequence[Result]) -> Iterator[tuple[str, str, list[Any]]]:
        """Yield the name of each measure, its name in lm-eval's results, and its values of items."""
        aggregations = self._task.aggregation() or {}
        found = dict[tuple[str, str], list[Any]]()
        for sample in self._evaluate(results)["samples"]:
            for metric in sample["metrics"]:
                found.setdefault((metric, sample["filter"]), []).append(sample[metric])
        for (metric, kept), values in found.items():
            kind = COMBINED.get(aggregations.get(metric, mean), WHOLE)
            shown = metric if kept == "none" else f"{metric},{kept}"
            yield f"{kind if _columns(values) is not None else WHOLE}/{shown}", f"{metric},{kept}", values

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the values of items, of measures that are means or ratios of them."""
        found = {name: _columns(values) for name, _, values in self._values(results)}
        return {name: values for name, values in found.items()
                if values is not None and not name.startswith(WHOLE)}  # fmt: skip

    def totals(self, results: Sequence[Result]) -> dict[str, float]:
        """Return the other measures."""
        given = self._evaluate(results)["results"]
        names = {name: key for name, key, _ in self._values(results) if name.startswith(WHOLE)}
        return {name: float(given[key]) for name, key in names.items() if isinstance(given[key], int | float)}

    def examples(self, results: Sequence[Result]) -> list[Example]:
        """Return contexts with the right and the given answers, as far as a task has them."""
        samples = self._evaluate(results)["samples"]
        found = list[Example]()
        for sample in samples:
            right = sample[sample["metrics"][0]] if sample["metrics"] else None
            if sample["filter"] != samples[0]["filter"] or right not in (0, 1) or len(sample["arguments"][0]) < 2:
                continue
            target, (text, given) = sample["target"], sample["arguments"][0]
            if self._task.OUTPUT_TYPE == "multiple_choice":
                choices = [argument[1] for argument in sample["arguments"]]
                given = choices[int(np.argmax([float(pair[0]) for pair in sample["filtered_resps"]]))]
                target = choices[target] if isinstance(target, int) and 0 <= target < len(choices) else target
            elif self._task.OUTPUT_TYPE == "generate_until":
                given = sample["resps"][0][0]
            found.append(Example(text, str(target), str(given), bool(right)))
        return found


def _response(value: object) -> Response:
    """Return a response that was JSON."""
    return tuple(value) if isinstance(value, list) else value  # pyright: ignore[reportReturnType] (from our own file)


def _columns(values: Sequence[Any]) -> np.ndarray | None:
    """Return values of items, numbers or pairs of them, as columns: float64 [n, k]; or None if they are neither."""
    try:
        columns = np.array(values, float)
    except (TypeError, ValueError):
        return None
    columns = columns[:, None] if columns.ndim == 1 else columns
    return columns if columns.ndim == 2 and np.isfinite(columns).all() else None


def guarded(act: Callable[[], T]) -> T:
    """Do what runs code of tasks, which can fail in any way.

    What it prints goes to standard error, and to a terminal alone: a task's bars and hints.

    Raises:
        UserError: it fails.
    """
    place = sys.stderr if sys.stderr.isatty() else io.StringIO()
    try:
        with contextlib.redirect_stdout(place), contextlib.redirect_stderr(place):
            return act()
    except UserError:
        raise
    except Exception as error:
        said = (str(error).splitlines() or [""])[0][:300]
        raise UserError(f"{type(error).__name__}: {said}") from error


def plan(reader: Reader, names: Sequence[str], include: Path | None = None, shots: Shots = OWN) -> Plan:
    """Read tasks and build their requests; a task that has anything wrong is a failure, and the others stay.

    Args:
        reader: the model.
        names: of lm-eval's tasks, groups and tags; files of tasks (.yaml), and folders of them.
        include: a folder of files of tasks, whose names are known then.
        shots: examples before each question, in place of a task's own number; 0 keeps that.

    Raises:
        UserError: lm-eval is too old.
    """
    version = importlib.metadata.version("lm_eval")
    if not hasattr(TaskManager, "load"):
        raise UserError(f"lm-eval {version} is too old: pip install -e '.[harness]'")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)  # the rest is for authors of tasks
    manager = guarded(lambda: TaskManager(include_path=None if include is None else [include]))
    parts, failures, digest, count = list[Part](), list[Failure](), hashlib.sha256(), 0
    digest.update(f"{version} {reader.reading} {reader.seed}".encode())
    for spec in (spec for name in names for spec in _specs(manager, name)):
        new, first = list[Part](), count
        try:
            task, found = guarded(lambda spec=spec: _load(manager, spec, version, shots))
            for group, name, definition in found:
                work = Harness(reader, definition)
                new.append(Part(task, group, name, work, first))
                first += work.count
                digest.update(work.digest)
        except UserError as error:
            failures.append(Failure(spec, f"{spec}: {error}"))
            continue
        parts, count = [*parts, *new], first
    return Plan(parts, failures, digest.hexdigest(), count)


def _specs(manager: TaskManager, name: str) -> list[str]:
    """Return what to load for a name: itself, or the files of a folder."""
    if name in manager.task_index or not Path(name).is_dir():
        return [name]
    return [str(file) for file in task_files.find([name]) if isinstance(file, Path)]


def _load(
    manager: TaskManager, spec: str, version: str, shots: Shots
) -> tuple[Task, list[tuple[str, str, Definition]]]:
    """Load a task, or all tasks of a group, and build their requests.

    Returns:
        What results call it; and of each task its group, its name, and itself.
    """
    if spec not in manager.task_index and not Path(spec).is_file():
        hint = closest(spec, manager.all_tasks, "").replace("`glm-jax `", "`lm_eval ls tasks`")
        raise UserError(f"neither a task of lm-eval nor a file of one: {hint}")
    random.seed(0)  # some tasks shuffle their choices; lm-eval has the same seeds
    np.random.seed(SEED)
    loaded = manager.load([spec])
    parents = {child: group for group, children in loaded.get("group_map", {}).items() for child in children}
    found, kinds = list[tuple[str, str, Definition]](), list[str]()
    for name, definition in loaded["tasks"].items():
        for mark, reason in UNABLE.items():
            if getattr(definition, mark, False):
                raise UserError(f"{name} {reason}")
        if shots.count or definition.get_config("num_fewshot") is None:
            definition.set_config("num_fewshot", shots.count)
        definition.set_fewshot_seed(shots.seed)
        definition.build_all_requests()
        count, kind = definition.get_config("num_fewshot"), str(definition.OUTPUT_TYPE)
        found.append((parents.get(name, "all"), f"{name}, version {definition.VERSION}, {count}-shot", definition))
        kinds.append(kind)
    whole = spec if spec in manager.task_index else next(iter([*loaded.get("groups", {}), *loaded["tasks"]]))
    kind = ", ".join(dict.fromkeys(kinds))
    return Task(Path(spec), whole, kind, "", f"lm-eval {version}"), found
