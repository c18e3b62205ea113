"""Fill the prompts of a file. With an output file, what is done survives whatever ends the command."""

from __future__ import annotations

import dataclasses
import itertools
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from glm_jax import signals
from glm_jax.cli import common
from glm_jax.cli.generate_entries import Entry
from glm_jax.cli.journal import Header, Journal, agreed, digest
from glm_jax.cli.progress import Progress, Request
from glm_jax.errors import UserError
from glm_jax.inference import Model
from glm_jax.inference.batch import batch_limit
from glm_jax.inference.fill import count_repeats
from glm_jax.inference.pending import Filled, Settings
from glm_jax.parallel import processes
from glm_jax.storage import digests
from glm_jax.storage.files import write_atomic
from glm_jax.workdir.checkpoint_folders import everyone

DONE, STOPPED = 0, 3  # exit codes

Block = list[tuple[int, str]]  # the numbers of prompts, and their results as lines


class Work(NamedTuple):
    """What is to be filled, and how."""

    model: Model
    settings: Settings
    entries: list[Entry]
    line: Callable[[Entry, Filled], str]  # how a result is written
    quantize: str | None = None  # what the model was opened with


def print_all(work: Work) -> int:
    """Print results in the order of the prompts, each as soon as all before it are there. All processes must call."""
    waiting: dict[int, str] = {}
    following = 0
    for block in _blocks(work, {}, bar=not sys.stdout.isatty()):
        waiting |= dict(block)
        while (text := waiting.pop(following, None)) is not None:
            following += 1
            if processes.is_first():
                print(text, end="", flush=True)
    return DONE


def write_all(work: Work, output: Path, workdir: Path) -> int:
    """Write results to a new file in the order of the prompts, and return the exit code. All processes must call.

    A signal stops it after the prompts that are being filled.

    Args:
        work: what to fill.
        output: the file, which appears when all is done; the results so far lie beside it, in OUTPUT.part.
        workdir: of the model.

    Raises:
        UserError: a prompt cannot be filled, the disk refuses the results, or those in OUTPUT.part depend on other
            prompts, options or weights.
    """
    part, total = output.with_name(f"{output.name}.part"), len(work.entries)
    header = _header(work, workdir)
    with signals.listening(stop := Request()):
        journal = Journal(part, header) if processes.is_first() else None
        try:
            done = agreed(part, header, journal)
            for block in _blocks(work, done):
                if journal is not None:
                    journal.add(block)
                done |= dict(block)
                if any(everyone("stop" if stop.made else "")):
                    break
            if journal is not None and len(done) == total:
                _finish(output, "".join(done[number] for number in range(total)))
                part.unlink()
        finally:
            if journal is not None:
                journal.close()
    told = common.say if processes.is_first() else _ignore
    if len(done) < total:
        told(f"stopped: {len(done)} of {total} results are in {part}; the same command resumes from there")
        return STOPPED
    told(f"written: {output}")
    return DONE


def _ignore(line: str) -> None:
    del line


def _finish(output: Path, content: str) -> None:
    try:
        write_atomic(output, content)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror}): fix that, and the same command resumes"
        ) from error


def _header(work: Work, workdir: Path) -> Header:
    """Return what results depend on; a mesh is not among it."""
    model, settings = work.model, work.settings
    options: dict[str, object] = {"strategy": type(settings.options).__name__.lower()}
    for name, value in dataclasses.asdict(settings).items():
        options |= value if isinstance(value, Mapping) else {name: value}
    options |= {"dtype": model.decoder.config.compute, "quantize": work.quantize, "form": work.line.__name__}
    folder = workdir / "checkpoints" / ("" if model.step is None else str(model.step))
    return {
        "prompts": {"digest": digest([[entry.id, entry.line, entry.text] for entry in work.entries])},
        "tokens": {"digest": model.tokenizer and model.tokenizer.digest},
        "weights": {"step": model.step, "digest": digests.identity(folder)},
        "options": options,
    }


def _blocks(work: Work, done: Mapping[int, str], *, bar: bool = True) -> Iterator[Block]:
    """Fill what is not done, and yield the results of prompts that were filled together."""
    entries = work.entries
    left = [number for number in range(len(entries)) if number not in done]
    repeats = count_repeats([entry.text for entry in entries])
    with Progress(len(entries), len(done), shown=bar and processes.is_first()) as progress:
        found = work.model.fill_each(
            [entries[number].text for number in left],
            work.settings,
            progress.say,
            repeats=[repeats[number] for number in left],
            names=[entries[number].place for number in left],
        )
        while together := list(itertools.islice(found, batch_limit(work.model.decoder, work.settings.beams))):
            progress.add(len(together), sum(len(fill.tokens) for _, filled in together for fill in filled.fills))
            yield [(left[index], work.line(entries[left[index]], filled)) for index, filled in together]
