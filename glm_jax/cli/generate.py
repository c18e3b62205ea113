"""`glm-jax generate`: fill the blanks of prompts."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli import common, generate_entries, generate_flags
from glm_jax.cli.generate_entries import Entries, Entry
from glm_jax.config.training import Mesh
from glm_jax.errors import UserError

if TYPE_CHECKING:
    from glm_jax.inference import Model
    from glm_jax.inference.pending import Settings


def run(arguments: Sequence[str]) -> int:
    """Fill the blanks of prompts with the model of a workdir."""
    values = generate_flags.define()
    if not common.parse(values, arguments, ["workdir"]):
        return 0
    common.require(values, [name for name in ("prompt", "input", "output") if values[name].value is not None])
    _check(values)
    options = generate_flags.strategy_options(values)

    from glm_jax.parallel import schedulers

    given = functools.cache(lambda: _given(values))
    if not schedulers.joins(values.coordinator):  # before jax is imported; one of several must tell the others
        generate_flags.check_workdir(values)
        if values.output:
            _check_output(Path(values.output))
        given()

    from glm_jax.parallel import processes

    processes.start(values.coordinator, values.processes, values.process, Mesh().collective_timeout)
    return processes.together(lambda: _generate(values, options, given))


def _check(values: flags.FlagValues) -> None:
    """Refuse flags that exclude each other."""
    if values.prompt is not None and values.input is not None:
        raise UserError("--prompt and --input are both given: leave one of them out")
    if values.max_tokens is not None and values.out_seq_length is not None:
        raise UserError("--max_tokens and --out_seq_length both limit a fill: leave one of them out")
    if values.output is not None and values.prompt is None and values.input is None and _is_terminal():
        raise UserError("--output needs prompts: give --input FILE")


def _check_output(path: Path) -> None:
    """Check that a new file can be written at `path`, and make its folder.

    Raises:
        UserError: there is a file already, or none can be made.
    """
    try:
        if path.exists() or path.is_symlink():
            raise UserError(f"--output {path} exists: remove it or name another")
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--output {path} cannot be written ({error.strerror}): name another") from error
    if not os.access(path.parent, os.W_OK | os.X_OK):
        raise UserError(f"--output {path} cannot be written ({path.parent} is not writable): name another")


def _is_terminal() -> bool:
    return sys.stdin is not None and sys.stdin.isatty()  # pyright: ignore[reportUnnecessaryComparison]


def _generate(values: flags.FlagValues, options: Mapping[str, object], read: Callable[[], Entries | None]) -> int:
    from glm_jax.cli import generate_batch, generate_terminal
    from glm_jax.inference import strategies
    from glm_jax.inference.pending import Settings
    from glm_jax.parallel import processes

    settings = Settings(
        strategies.named(values.strategy, **options),
        values.max_tokens or generate_flags.MAX_TOKENS,
        values.seed,
        tuple(values.stop or ()),
        values.one_context,
        values.out_seq_length,
    )
    given = read()
    output = values.output and Path(values.output)
    if output and processes.is_first():
        _check_output(output)
    model = _open(values)

    def answer(text: str, repeat: int) -> None:
        if values.json:
            _print_json(model, settings, text, repeat)
        else:
            generate_terminal.show(model, settings, text, repeat)

    if given is None:
        return generate_terminal.converse(answer)
    if values.prompt is not None and output is None:
        answer(values.prompt, 0)
        return 0
    if given.blank and processes.is_first():
        common.say(f"{given.blank} blank line{'s are' if given.blank > 1 else ' is'} skipped")
    line = generate_entries.as_json if values.json or given.is_json else generate_entries.as_text
    work = generate_batch.Work(model, settings, given.entries, line, values.quantize)
    return generate_batch.write_all(work, output, Path(values.workdir)) if output else generate_batch.print_all(work)


def _given(values: flags.FlagValues) -> Entries | None:
    """Return the prompts, or None if a person at a terminal will type them."""
    if values.prompt is not None:
        return Entries([Entry(values.prompt)])
    if values.input in (None, "-") and _has_peers(values):
        raise UserError("several processes cannot read one standard input: give --prompt TEXT or --input FILE")
    if values.input is None and _is_terminal():
        return None
    return generate_entries.read("-" if values.input is None else values.input)


def _has_peers(values: flags.FlagValues) -> bool:
    """Whether there are several processes, which have joined by now."""
    from glm_jax.parallel import schedulers

    if not schedulers.joins(values.coordinator):
        return False
    from glm_jax.parallel import processes

    return not processes.alone()


def _open(values: flags.FlagValues) -> Model:
    from glm_jax.inference import Model

    model = Model.open(values.workdir, values.mesh, values.dtype, values.quantize, values.step)
    if model.tokenizer is None:
        raise UserError(f"{values.workdir} has no tokenizer: convert its weights again, with --tokenizer FILE")
    return model


def _print_json(model: Model, settings: Settings, text: str, repeat: int = 0) -> None:
    from glm_jax.parallel import processes

    say = common.say if processes.is_first() else None
    for _, filled in model.fill_each([text], settings, say, repeats=[repeat]):
        if processes.is_first():
            print(generate_entries.as_json(Entry(text), filled), end="", flush=True)
