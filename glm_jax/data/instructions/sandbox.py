"""The program that runs templates, in a process of its own with limits on its time and memory.

Templates are other people's programs. Jinja's sandbox keeps them from the machine, but one operation of theirs can
take hours (`10**10**8`) or all memory (`'a' * 10**10`), and a deep one can exhaust the stack of the compiler. So the
system ends this process when a job exceeds its budget, and render.py starts another.

    python -m glm_jax.data.instructions.sandbox SECONDS BYTES

reads pickled lists of pickled jobs from stdin, and answers each list with a line of JSON, a list: for each job the
parts between the separators, or {"reason", "message"}.
"""

from __future__ import annotations

import contextlib
import functools
import json
import pickle
import random
import resource
import signal
import sys
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import TypeVar

import jinja2
from jinja2.runtime import Context
from jinja2.sandbox import SandboxedEnvironment

from glm_jax.data.instructions.deepstruct import filter_relation, filter_type, format_triple
from glm_jax.data.instructions.render import FAILS, OVER_BUDGET, OVER_MEMORY
from glm_jax.types import Json

Item = TypeVar("Item")
Job = tuple[str, str | None, Mapping[str, object] | None, int]  # template, answer choices, record, seed

SEPARATOR = "|||"
# What a template's separators become before it runs, so that those in a record stay text. Printing a list, and filters
# for JSON or case, leave it as it is.
MARK = "|~|~|~|"
DRAWS = "_draws"  # the variable that holds the render's random generator
LONGEST_OUTPUT = 4_000_000  # characters of a prompt and its answer
LONGEST_REASON = 200  # characters of an error that are told
TEMPLATES = 512  # compiled ones to keep


class _FromEnd(int):
    """A number with a minus written in the template."""


class _Environment(SandboxedEnvironment):
    """The sandbox with the filters of PromptSource's templates and the functions of those for DeepStruct's data sets.

    A missing field is an error, and so is a label of -1.
    A negative index counts from the end only where the template itself has the minus: in a record, -1 means that there
    is no label.
    """

    intercepted_unops = frozenset("-")

    def __init__(self) -> None:
        super().__init__(undefined=jinja2.StrictUndefined)
        self.unop_table["-"] = lambda value: _FromEnd(-value) if isinstance(value, int) else -value
        self.filters["choice"] = self.filters["random"] = _choice
        self.filters["most_frequent"] = most_frequent
        self.globals["zip"], self.globals["shuffle"] = zip, _shuffle
        for function in (filter_relation, filter_type, format_triple):
            self.globals[function.__name__] = function

    def is_safe_attribute(self, obj: object, attr: str, value: object) -> bool:
        # DeepStruct's templates ask `entities.__len__()`, which can do no harm
        return attr == "__len__" or super().is_safe_attribute(obj, attr, value)

    def getitem(self, obj: object, argument: object) -> object:
        negative = isinstance(argument, int) and argument < 0 and not isinstance(argument, _FromEnd)
        if negative and not isinstance(obj, Mapping):
            return self.undefined(f"the index {argument} is negative")
        return super().getitem(obj, argument)


@jinja2.pass_context
def _choice(context: Context, choices: Sequence[Item]) -> Item:
    return context[DRAWS].choice(list(choices))


@jinja2.pass_context
def _shuffle(context: Context, items: Iterable[Item]) -> list[Item]:
    found = list(items)
    context[DRAWS].shuffle(found)
    return found


def most_frequent(items: Sequence[Item]) -> list[Item]:
    """Return the items that occur as often as the most frequent one, in order; empty if there are none."""
    counts = Counter(items)
    most = max(counts.values(), default=0)
    return [item for item, count in counts.items() if count == most]


_ENVIRONMENT = _Environment()


@functools.lru_cache(TEMPLATES)
def _compile(jinja: str) -> jinja2.Template:
    return _ENVIRONMENT.from_string(jinja.replace(SEPARATOR, MARK))


def run(job: Job) -> list[str] | Json:
    """Return what a template makes of a record, cut at its separators, each part stripped; or why it cannot.

    A job without a record only compiles the template.
    """
    jinja, answer_choices, record, seed = job
    try:
        prompt, choices = _compile(jinja), _compile(answer_choices) if answer_choices else None
        if record is None:
            return []
        if MARK in str(record):
            return _refused("reserved text", f"the text {MARK} is reserved: remove it")
        # PromptSource writes hyphens in the names of fields as underscores
        fields = {**{name.replace("-", "_"): value for name, value in record.items()}, **record}
        fields[DRAWS] = random.Random(seed)
        if choices is not None:
            fields["answer_choices"] = [part.strip() for part in _render(choices, fields).split(MARK)]
        return [part.strip() for part in _render(prompt, fields).split(MARK)]
    except MemoryError:
        raise
    except _TooLong:
        return _refused(OVER_BUDGET, f"gives more than {LONGEST_OUTPUT:,} characters")
    except RecursionError:
        return _refused(FAILS, "is nested too deeply, or calls itself")
    except Exception as error:  # a template can raise anything that Python and Jinja know
        said = " ".join(str(error).split())[:LONGEST_REASON] or type(error).__name__
        return _refused(FAILS, f"fails ({said})")


class _TooLong(Exception):
    pass


def _render(template: jinja2.Template, fields: Mapping[str, object]) -> str:
    text = template.render(fields)
    if len(text) > LONGEST_OUTPUT:
        raise _TooLong
    return text


def _refused(reason: str, message: str) -> Json:
    return {"reason": reason, "message": message}


def main() -> None:
    """Answer jobs until stdin ends."""
    seconds, memory = float(sys.argv[1]), int(sys.argv[2])
    _, most = resource.getrlimit(resource.RLIMIT_AS)
    with contextlib.suppress(ValueError, OSError):  # macOS has no such limit
        resource.setrlimit(resource.RLIMIT_AS, (memory if most == resource.RLIM_INFINITY else min(memory, most), most))
    while True:
        try:
            jobs: list[bytes] = pickle.load(sys.stdin.buffer)
            found = []
            for job in jobs:
                # Processor time, so that a busy machine refuses nothing else. The signal ends the process, even within
                # one long operation.
                signal.setitimer(signal.ITIMER_PROF, seconds)
                found.append(run(pickle.loads(job)))
            signal.setitimer(signal.ITIMER_PROF, 0)
            sys.stdout.buffer.write(json.dumps(found).encode() + b"\n")
            sys.stdout.buffer.flush()
        except EOFError:
            return
        except MemoryError:
            sys.exit(OVER_MEMORY)


if __name__ == "__main__":
    main()
