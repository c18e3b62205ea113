"""Fill the prompts of a file. With an output file, what is done survives whatever ends the command."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

from tqdm import tqdm

from glm_jax import signals
from glm_jax.cli import common
from glm_jax.cli.generate_entries import Entry
from glm_jax.cli.generate_journal import Header, Journal, read
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
PAUSE = 30  # seconds between two lines of progress, without a terminal
BAR = "{n_fmt}/{total_fmt} {bar} {remaining}{postfix}"

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
    with signals.listening(stop := _Request()):
        journal = Journal(part, header) if processes.is_first() else None
        try:
            done = _agreed(part, header, journal)
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


class _Request:
    """A request to stop, made by calling it."""

    made = False

    def __call__(self) -> None:
        self.made = True


def _ignore(line: str) -> None:
    del line


def _finish(output: Path, content: str) -> None:
    try:
        write_atomic(output, content)
    except OSError as error:
        raise UserError(
            f"--output {output} cannot be written ({error.strerror}): fix that, and the same command resumes"
        ) from error


def _agreed(part: Path, header: Header, journal: Journal | None) -> dict[int, str]:
    """Return what is done, which all processes of a run must see alike."""
    everyone("")  # until the first process has opened the journal
    done = read(part, header)[0] if journal is None else journal.lines
    if len(set(everyone(_digest(sorted(done))))) > 1:
        raise UserError(f"the processes see different contents of {part}: put --output where all of them read it")
    return done


def _header(work: Work, workdir: Path) -> Header:
    """Return what results depend on; a mesh is not among it."""
    model, settings = work.model, work.settings
    options: dict[str, object] = {"strategy": type(settings.options).__name__.lower()}
    for name, value in dataclasses.asdict(settings).items():
        options |= value if isinstance(value, Mapping) else {name: value}
    options |= {"dtype": model.decoder.config.compute, "quantize": work.quantize, "form": work.line.__name__}
    folder = workdir / "checkpoints" / ("" if model.step is None else str(model.step))
    return {
        "prompts": {"digest": _digest([[entry.id, entry.line, entry.text] for entry in work.entries])},
        "tokens": {"digest": model.tokenizer and model.tokenizer.digest},
        "weights": {"step": model.step, "digest": digests.identity(folder)},
        "options": options,
    }


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()


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


class Progress:
    """How far a file is: a bar on a terminal, else a line now and then."""

    def __init__(self, total: int, done: int, *, shown: bool) -> None:
        """Begin with `done` of `total` prompts."""
        self._shown, self._total, self._first, self._done, self._tokens = shown, total, done, done, 0
        self._started = self._told = time.monotonic()
        self._bar = tqdm(
            total=total,
            initial=done,
            bar_format=BAR,
            dynamic_ncols=True,
            file=sys.stderr,
            disable=None if shown else True,  # None: a bar on a terminal alone
        )

    def __enter__(self) -> Progress:
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.close()

    def say(self, line: str) -> None:
        """Print a line, above the bar if there is one."""
        if processes.is_first():
            self._bar.clear()
            common.say(line)

    def add(self, prompts: int, tokens: int) -> None:
        """Count prompts that are filled, and the tokens of their fills."""
        now = time.monotonic()
        self._tokens += tokens
        self._done += prompts
        speed = f"{self._tokens / max(now - self._started, 1e-9):,.0f} tok/s"
        self._bar.set_postfix_str(speed, refresh=False)
        self._bar.update(prompts)
        if self._shown and self._bar.disable and now - self._told >= PAUSE:
            self._told = now
            left = (now - self._started) / (self._done - self._first) * (self._total - self._done)
            clock = time.strftime("%H:%M:%S")
            self.say(f"{clock} {self._done}/{self._total} prompts, {speed}, {tqdm.format_interval(left)} left")
