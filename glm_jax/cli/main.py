"""The command line: `glm-jax <command> [flags]`.

Rooms are imported inside the commands, so that `--help` and `glm-jax config` answer at once.
Exit codes: 0 done, 1 another process of the run is gone (one line), 2 a usage or configuration error (one line),
3 stopped early on request with a checkpoint saved, 130 interrupted before there was anything to save, 141 ended
because nobody reads its output any more, as after `| head`.
"""

from __future__ import annotations

import ast
import os
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import get_args

from absl import flags, logging
from ml_collections import config_flags

from glm_jax.cli import flags as cli_flags
from glm_jax.config import by_key, default_values, with_changes
from glm_jax.config.fields import closest
from glm_jax.config.training import Schedule
from glm_jax.errors import UserError

Command = Callable[[Sequence[str]], int]

EXPERIMENTS = Path("experiments")
UNREAD = 141  # what a shell gives for a program that SIGPIPE has ended


def say(line: str) -> None:
    """Tell the person at the terminal; results alone go to standard output."""
    print(line, file=sys.stderr, flush=True)


def train(arguments: Sequence[str]) -> int:
    """Train as an experiment says; the same command goes on from the newest checkpoint."""
    values = cli_flags.flag_values("train")
    cli_flags.define_config(values, arguments)
    cli_flags.define_workdir(values)
    flags.DEFINE_string("replay", None, "an interventions.jsonl: make its changes at its steps", flag_values=values)
    together = "for several processes, where no scheduler says so:"
    flags.DEFINE_string("coordinator", None, f"{together} HOST:PORT of process 0", flag_values=values)
    flags.DEFINE_integer("processes", None, f"{together} how many", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("process", None, f"{together} which this is, from 0", lower_bound=0, flag_values=values)
    if not cli_flags.parse(values, arguments, ["config", "workdir"]):
        return 0
    resolved = cli_flags.load(values)

    from glm_jax.parallel import processes
    from glm_jax.workdir import interventions

    if values.replay:
        planned = interventions.plan(interventions.read(Path(values.replay)))
        resolved = with_changes(resolved, {"interventions": planned})
    processes.start(values.coordinator, values.processes, values.process, resolved.mesh.collective_timeout)

    from glm_jax.inference import Model, examples
    from glm_jax.training import loop

    workdir = Path(values.workdir)

    def run() -> int:
        run = loop.Run(resolved, workdir, say)
        code = run.go()
        if code == loop.DONE and processes.alone():  # the examples need the whole model on one device
            model = Model.open(workdir)
            documents, languages = run.heldout(), run.prepared.languages
            for line in examples.heldout(model.config, model.params, model.tokenizer, documents, languages):
                print(line, flush=True)
        return code

    return processes.together(run)


def generate(arguments: Sequence[str]) -> int:
    """Fill the blanks of a prompt with the model of a workdir."""
    values = cli_flags.flag_values("generate")
    cli_flags.define_workdir(values)
    flags.DEFINE_string("prompt", None, "text with [MASK] or [gMASK] in it", flag_values=values)
    flags.DEFINE_enum("strategy", "greedy", ["greedy", "sample"], "how tokens are chosen", flag_values=values)
    flags.DEFINE_integer("max_tokens", 64, "at most this many tokens a blank", lower_bound=1, flag_values=values)
    flags.DEFINE_float("temperature", 1.0, "of sampling", lower_bound=0.0, flag_values=values)
    flags.DEFINE_integer("top_k", 0, "sample from this many tokens, 0: all", lower_bound=0, flag_values=values)
    flags.DEFINE_float(
        "top_p",
        0.7,
        "sample from this much probability",
        lower_bound=0.0,
        upper_bound=1.0,
        flag_values=values,
    )
    flags.DEFINE_integer("seed", 1234, "of sampling", lower_bound=0, upper_bound=2**63 - 1, flag_values=values)
    if not cli_flags.parse(values, arguments, ["workdir", "prompt"]):
        return 0

    from glm_jax.inference import Model
    from glm_jax.inference.fill import fill
    from glm_jax.inference.strategies import GREEDY, Sampling

    model = Model.open(values.workdir)
    sampled = Sampling(values.temperature, values.top_k, values.top_p)
    sampling = sampled if values.strategy == "sample" else GREEDY
    pieces = fill(
        model.config,
        model.params,
        model.tokenizer,
        values.prompt,
        max_tokens=values.max_tokens,
        sampling=sampling,
        seed=values.seed,
    )
    underline, plain = ("\x1b[4m", "\x1b[0m") if sys.stdout.isatty() else ("", "")
    print("".join(f"{underline}{piece.text}{plain}" if piece.filled else piece.text for piece in pieces))
    return 0


def config(arguments: Sequence[str]) -> int:
    """List the experiments (`config list`), show the values of one (`show`), explain all keys (`keys`)."""
    usage = "glm-jax config list|keys, or glm-jax config show --config experiments/X.py [--config.KEY=VALUE ...]"
    if not arguments or arguments[0] in ("-h", "--help"):
        print(f"usage: {usage}")
        return 0
    if arguments[0] == "list" and len(arguments) == 1:
        return _list_experiments()
    if arguments == ["keys"]:
        from glm_jax.config.reference import reference

        print("\n".join(reference()))
        return 0
    if arguments[0] == "show":
        return _show_config(arguments[1:])
    raise UserError(f"unknown arguments {' '.join(arguments)}: use {usage}")


def convert(arguments: Sequence[str]) -> int:
    """Convert official checkpoints to ours (`convert sat-to-orbax`) and back (`convert orbax-to-sat`)."""
    if not arguments or arguments[0] not in ("sat-to-orbax", "orbax-to-sat"):
        usage = "glm-jax convert sat-to-orbax|orbax-to-sat --config FILE --path FROM --out TO [flags]"
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {usage}")
            return 0
        raise UserError(f"say which way to convert: {usage}")
    direction, *rest = arguments
    values = cli_flags.flag_values(f"convert {direction}")
    cli_flags.define_config(values, rest)
    flags.DEFINE_string("path", None, "the directory to read: it holds `latest`, or steps", flag_values=values)
    flags.DEFINE_string("out", None, "the directory to write", flag_values=values)
    if direction == "orbax-to-sat":
        flags.DEFINE_integer("tensor_parallel", 1, "files to write", lower_bound=1, flag_values=values)
        flags.DEFINE_integer("iteration", None, "to name it by; by default the step", flag_values=values)
        flags.DEFINE_enum("dtype", "float32", ["float32", "float16"], "of the files", flag_values=values)
    if not cli_flags.parse(values, rest, ["config", "path", "out"]):
        return 0
    resolved = cli_flags.load(values)
    if not resolved.model.vocab_size:
        raise UserError("model.vocab_size is 0: say how many rows the embedding has, --config.model.vocab_size=N")

    from glm_jax.interop.convert import orbax_to_sat, sat_to_orbax

    cfg = resolved.glm(0)
    try:
        if direction == "sat-to-orbax":
            written = sat_to_orbax(values.path, cfg, values.out)
        else:
            orbax_to_sat(values.path, cfg, values.out, values.tensor_parallel, values.iteration, values.dtype)
            written = values.out
    except OSError as error:
        raise UserError(f"--path {values.path} cannot be brought to --out {values.out} ({error}): mend that, or name "
                        "another directory") from error  # fmt: skip
    say(f"written: {written}")
    return 0


def corpus(arguments: Sequence[str]) -> int:
    """Bring sample texts (`corpus fetch`), make tokenised shards (`corpus build`), show them (`corpus inspect`)."""
    if not arguments or arguments[0] not in ("fetch", "build", "inspect"):
        usage = "glm-jax corpus fetch|build|inspect --config FILE [flags]"
        if {"-h", "--help"} & set(arguments):
            print(f"usage: {usage}")
            return 0
        raise UserError(f"say what to do with the corpus: {usage}")
    action, *rest = arguments
    values = cli_flags.flag_values(f"corpus {action}")
    cli_flags.define_config(values, rest)
    if action == "build":
        workers = os.cpu_count() or 1
        flags.DEFINE_integer("workers", workers, "processes that share the work", lower_bound=1, flag_values=values)
        flags.DEFINE_bool("strict", False, "stop at the first damaged record", flag_values=values)
    if action == "inspect":
        flags.DEFINE_integer("rows", 3, "training rows to show", lower_bound=0, flag_values=values)
    if not cli_flags.parse(values, rest, ["config"]):
        return 0
    resolved = cli_flags.load(values)

    from glm_jax.data import inspect
    from glm_jax.data.corpora import prepare

    if action == "fetch":
        prepare.fetch(resolved, say)
    elif action == "build":
        prepared = prepare.prepare(resolved, say, workers=values.workers, strict=values.strict)
        if values.strict:
            prepare.check_undamaged(prepared)
    else:
        from glm_jax.training.evaluation import training_batches

        prepared = prepare.prepare(resolved, say)
        for line in inspect.counts(prepared):
            print(line)
        batches = training_batches(resolved, prepared)
        batch = batches.at(0, values.rows)
        for line in inspect.rows(batch, batches.sources, prepared.tokenizer, coloured=sys.stdout.isatty()):
            print(line)
    return 0


def schedule(arguments: Sequence[str]) -> int:
    """Draw a pipeline schedule: which stage works on which microbatch when, its bubble and its stash."""
    values = cli_flags.flag_values("schedule")
    flags.DEFINE_enum("name", "1f1b", get_args(Schedule), "the schedule", flag_values=values)
    flags.DEFINE_integer("stages", 4, "stages of the pipeline", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("microbatches", 8, "microbatches of a step", lower_bound=1, flag_values=values)
    flags.DEFINE_string("svg", None, "also write the drawing to this file", flag_values=values)
    if not cli_flags.parse(values, arguments, []):
        return 0

    from glm_jax.parallel.pipeline import schedule as schedules
    from glm_jax.parallel.pipeline.drawing import ascii_timeline, svg_timeline
    from glm_jax.storage.files import write_atomic

    built = schedules.build(values.name, values.stages, values.microbatches)
    print(ascii_timeline(built), end="")
    if values.svg:
        try:
            write_atomic(Path(values.svg), svg_timeline(built))
        except OSError as error:
            raise UserError(f"--svg {values.svg} cannot be written ({error.strerror}): name another file") from error
        say(f"written: {values.svg}")
    return 0


def report(arguments: Sequence[str]) -> int:
    """Draw the curves and the events of a run on one page."""
    values = cli_flags.flag_values("report")
    cli_flags.define_workdir(values)
    out = "the page, .html or .png; by default report.html in the workdir"
    flags.DEFINE_string("out", None, out, flag_values=values)
    if not cli_flags.parse(values, arguments, ["workdir"]):
        return 0

    from glm_jax.figures import report as reports

    say(f"written: {reports.write(Path(values.workdir), Path(values.out) if values.out else None)}")
    return 0


def sweep(arguments: Sequence[str]) -> int:
    """Train the members of an ablation together, and gather their results; the same command goes on."""
    values = cli_flags.flag_values("sweep")
    cli_flags.define_config(values, arguments)
    cli_flags.define_workdir(values)
    cores = os.cpu_count() or 1
    flags.DEFINE_integer("parallel", cores, "processes at a time, of a core each", lower_bound=1, flag_values=values)
    flags.DEFINE_bool("dry-run", False, "list the members and do nothing", flag_values=values)
    if not cli_flags.parse(values, arguments, ["config"]):
        return 0
    lists = values["dry-run"].value
    if not lists:
        cli_flags.require(values, ["workdir"])
    resolved = cli_flags.load(values)
    path = Path(config_flags.get_config_filename(values["config"]))

    from glm_jax.sweeps import run as sweeps

    if lists:
        for line in sweeps.listing(resolved, path):
            print(line)
        return 0
    return sweeps.run(resolved, path, Path(values.workdir), values.parallel, say)


COMMANDS: dict[str, Command] = {
    "train": train,
    "generate": generate,
    "convert": convert,
    "corpus": corpus,
    "config": config,
    "schedule": schedule,
    "report": report,
    "sweep": sweep,
}


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    try:
        code = _run(arguments)
        print(end="", flush=True)  # at the interpreter's exit nobody could answer a pipe that is not read
        return code
    except BrokenPipeError:  # `| head` has read enough
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except BrokenPipeError:  # what is left in its buffer would be tried again, and fail again
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())
        return UNREAD


def _run(arguments: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    logging.set_verbosity(logging.ERROR)  # orbax explains itself at length
    if not arguments or arguments[0] in ("-h", "--help"):
        print("usage: glm-jax <command> [flags]\n")
        for name, command in COMMANDS.items():
            print(f"  {name:10} {_summary(command)}")
        print("\n`glm-jax <command> --help` lists a command's flags.")
        return 0
    try:
        if arguments[0] not in COMMANDS:
            raise UserError(f"unknown command {arguments[0]}: {closest(arguments[0], list(COMMANDS))}")
        return COMMANDS[arguments[0]](arguments[1:])
    except UserError as error:
        say(f"error: {error}")
        return 2
    except KeyboardInterrupt:
        say("interrupted; what was finished is kept, and the same command goes on from there")
        return 130


def _summary(command: Command) -> str:
    return (command.__doc__ or "").splitlines()[0]


def _list_experiments() -> int:
    if not EXPERIMENTS.is_dir():
        raise UserError(f"there is no folder {EXPERIMENTS} here: run this in the root of the repository")
    for path in sorted(EXPERIMENTS.rglob("*.py")):
        docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
        print(f"{path!s:32} {docstring.partition(chr(10))[0]}")
    return 0


def _show_config(arguments: Sequence[str]) -> int:
    values = cli_flags.flag_values("config show")
    cli_flags.define_config(values, arguments)
    flags.DEFINE_bool("specs", False, "show how the mesh splits every array of the state instead", flag_values=values)
    if not cli_flags.parse(values, arguments, ["config"]):
        return 0
    resolved = cli_flags.load(values)
    if values.specs:
        from glm_jax.planning import layout

        for line in layout.table(resolved):
            print(line)
        return 0
    defaults = default_values({"sources": resolved.data.sources, "instructions": resolved.data.instructions})
    overrides = config_flags.get_override_values(values["config"])
    for key, value in by_key(resolved).items():
        if key in overrides:
            origin = f"--config.{key}"
        elif key in defaults and defaults[key] == value:
            origin = "default"
        else:
            origin = config_flags.get_config_filename(values["config"])
        print(f"{key:36} {value!r:24} {origin}")
    return 0
