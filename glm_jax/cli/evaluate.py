"""`glm-jax evaluate`: score a model on task files, or on tasks of lm-eval."""

from __future__ import annotations

import importlib.util
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from absl import flags

from glm_jax import signals
from glm_jax.cli import common, generate_flags
from glm_jax.config.training import Mesh
from glm_jax.errors import UserError
from glm_jax.evaluation.tasks.names import NAMES, UNIDIRECTIONAL

if TYPE_CHECKING:
    from glm_jax.data.tokenizers.protocol import Tokenizer
    from glm_jax.evaluation.few_shot import Shots
    from glm_jax.evaluation.results import Evaluation
    from glm_jax.evaluation.run import Plan
    from glm_jax.evaluation.work import Result
    from glm_jax.inference import Model

STOPPED, FAILED = 3, 4  # exit codes
FOLDER = "evaluation"  # in the workdir


def run(arguments: Sequence[str]) -> int:
    """Score a model on task files in the form of the GLM-130B repository, or on tasks of lm-eval."""
    values = common.flag_values("evaluate", "--workdir runs/quickstart --tasks tasks/lambada --data data --out scores")
    common.define_workdir(values)
    summary = (
        f"task files (.yaml), folders of them, and names: {', '.join(NAMES)}, each also with {UNIDIRECTIONAL}; with "
        "--harness names of lm-eval's tasks, such as hellaswag,arc_easy"
    )
    flags.DEFINE_multi_string("tasks", None, summary, flag_values=values)
    summary = "the tasks are those of EleutherAI's lm-evaluation-harness (pip install -e '.[harness]')"
    flags.DEFINE_bool("harness", False, summary, flag_values=values)
    common.define_path(values, "include", "with --harness: a folder of task files, whose names --tasks may have")
    summary = "with --harness: read contexts from left to right, not in both directions"
    flags.DEFINE_bool("unidirectional", False, summary, flag_values=values)
    common.define_path(values, "data", "the folder that the tasks' paths begin in (default: that of the task file)")
    common.define_path(values, "out", f"the folder for the results (default: {FOLDER} in the workdir)")
    summary = "examples before each question, where items have a right answer; those without room are dropped whole"
    flags.DEFINE_integer("shots", 0, summary, lower_bound=0, upper_bound=1000, flag_values=values)
    flags.DEFINE_integer("seed", 1234, "seed of the choice of examples", lower_bound=0, flag_values=values)
    summary = "look for the tasks' texts in what the run was trained on, and report the shares of items and n-grams"
    flags.DEFINE_bool("contamination", False, summary, flag_values=values)
    generate_flags.define_model(values)
    common.define_processes(values)
    if not common.parse(values, arguments, ["workdir", "tasks"], nameless=["tasks"]):
        return 0
    _check_flags(values)

    from glm_jax.parallel import schedulers

    if not schedulers.joins(values.coordinator):  # before jax is imported; one of several must tell the others
        generate_flags.check_workdir(values)

    from glm_jax.parallel import processes

    processes.start(values.coordinator, values.processes, values.process, Mesh().collective_timeout)
    command = shlex.join(["glm-jax", "evaluate", *arguments])
    return processes.together(lambda: _evaluate(values, command))


def _check_flags(values: flags.FlagValues) -> None:
    """Refuse flags that do not go together, a folder that is not there, and packages that are missing."""
    for name in ("include", "unidirectional"):
        if values[name].value and not values.harness:
            raise UserError(f"--{name} is for tasks of lm-eval: add --harness, or leave it out")
    if values.data and values.harness:
        raise UserError("--data is not for tasks of lm-eval, which name their own data: leave it out")
    if values.include and not Path(values.include).is_dir():
        raise UserError(f"--include {values.include} is no folder: name one with task files")
    if values.harness and importlib.util.find_spec("lm_eval") is None:
        raise UserError("--harness needs the package lm-eval: pip install -e '.[harness]'")


def _plan(
    values: flags.FlagValues, model: Model, tokenizer: Tokenizer, shots: Shots, say: Callable[[str], None]
) -> Plan:
    if not values.harness:
        from glm_jax.evaluation import run as evaluation
        from glm_jax.evaluation.tasks import build
        from glm_jax.workdir import folder

        places = [*build.places(values.tasks, lambda: folder.read_config(Path(values.workdir)), say)]
        return evaluation.plan(model.decoder, tokenizer, places, Path(values.data) if values.data else None, shots)

    from glm_jax.evaluation import lm_eval_tasks
    from glm_jax.evaluation.lm_eval_requests import Reader

    names = dict.fromkeys(name.strip() for given in values.tasks for name in given.split(","))
    reader = Reader.of(model, causal=values.unidirectional)
    return lm_eval_tasks.plan(reader, [*filter(None, names)], Path(values.include) if values.include else None, shots)


def _evaluate(values: flags.FlagValues, command: str) -> int:
    from glm_jax.cli import training_text
    from glm_jax.evaluation import results
    from glm_jax.evaluation import run as evaluation
    from glm_jax.evaluation.few_shot import Shots
    from glm_jax.inference import Model
    from glm_jax.parallel import processes

    say = common.say if processes.is_first() else _ignore
    out = Path(values.out) if values.out else Path(values.workdir) / FOLDER
    _check_page()
    model = Model.open(values.workdir, values.mesh, values.dtype, values.quantize, values.step)
    if (tokenizer := model.tokenizer) is None:
        raise UserError(f"{values.workdir} has no tokenizer: convert its weights again, with --tokenizer FILE")
    shots = Shots(values.shots, values.seed)
    todo = _plan(values, model, tokenizer, shots, say)
    for task in dict.fromkeys(part.task for part in todo.parts):
        if task.ignored:
            say(f"{task.file}: ignored, as no field of a task: {', '.join(task.ignored)}")
        if shots.count and not any(part.work.shots for part in todo.parts if part.task == task):
            say(f"{task.file}: --shots does not apply, as its items have no right answer to show")
    for part in todo.parts:
        for note in part.work.notes:
            say(f"{part.name}: {note}")
    if todo.parts:
        sources = training_text.documents(Path(values.workdir), tokenizer, say) if values.contamination else []
        identity = _identity(model, values)
        worked = _work(todo, identity, out)
        if worked.stopped:
            say(f"stopped: {len(worked.done)} of {todo.units} results are in {out / results.PART}; "
                "the same command resumes from there")  # fmt: skip
            return STOPPED
        seen = training_text.look(todo, sources, tokenizer) if values.contamination else []
        if seen is None:
            say(f"stopped: all results are in {out / results.PART}; the same command looks for them in training text")
            return STOPPED
        made = results.Made(identity, command, worked.seconds, worked.tokens, worked.resumed)
        found = results.Evaluation(made, evaluation.report(todo, worked.done, contamination=seen), todo.failures)
        if processes.is_first():
            _write(out, found)
    for failure in todo.failures:
        say(f"failed: {failure.error}")
    if todo.failures:
        count = len(todo.failures)
        say(f"failed: {count} task{'s' if count > 1 else ''} could not be evaluated")
        return FAILED  # not an exception, which one of several processes would leave the others with
    return 0


def _check_page() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("evaluate needs matplotlib for its page: pip install -e '.[evaluation]'") from error


def _ignore(line: str) -> None:
    del line


def _identity(model: Model, values: flags.FlagValues) -> dict[str, object]:
    """Return what the results depend on besides the tasks; a mesh is not among it."""
    from glm_jax.storage import digests

    folder = Path(values.workdir) / "checkpoints" / ("" if model.step is None else str(model.step))
    return {
        "workdir": str(values.workdir),
        "step": model.step,
        "weights": digests.identity(folder),
        "tokenizer": model.tokenizer and model.tokenizer.digest,
        "dtype": model.decoder.config.compute,
        "quantize": values.quantize,
        "shots": values.shots,
        "seed": values.seed if values.shots else None,
    }


class Worked(NamedTuple):
    """What was done, and by when."""

    done: dict[int, Result]
    seconds: float
    tokens: int
    resumed: int
    stopped: bool


def _work(todo: Plan, identity: Mapping[str, object], out: Path) -> Worked:
    """Do what is not done yet; results go to a journal in the folder. All processes must call.

    A signal stops it after the units that are being done.
    """
    import json

    from glm_jax.cli import journal, progress
    from glm_jax.evaluation import results
    from glm_jax.evaluation import run as evaluation
    from glm_jax.parallel import processes
    from glm_jax.storage.files import json_line
    from glm_jax.workdir.checkpoint_folders import everyone

    part = out / results.PART
    header = {
        "tasks": {"digest": todo.digest},
        "tokens": {"digest": identity["tokenizer"]},
        "weights": {"step": identity["step"], "digest": identity["weights"]},
        "options": {name: identity[name] for name in ("dtype", "quantize", "shots", "seed")},
    }
    seconds, tokens, stopped = 0.0, 0, False
    with signals.listening(stop := progress.Request()):
        if processes.is_first():
            _make_folder(out)
        opened = journal.Journal(part, header, "--out") if processes.is_first() else None
        try:
            lines = journal.agreed(part, header, opened, "--out")
            done: dict[int, Any] = {number: json.loads(line) for number, line in lines.items()}
            resumed = len(done)
            with progress.Progress(todo.units, resumed, shown=processes.is_first(), what="results") as bar:
                for batch in evaluation.run(todo, dict(done)):
                    if opened is not None:
                        opened.add([(number, json_line(result)) for number, result in batch.results])
                    done |= dict(batch.results)
                    seconds, tokens = seconds + batch.seconds, tokens + batch.tokens
                    bar.add(len(batch.results), batch.tokens)
                    if stopped := any(everyone("stop" if stop.made else "")):
                        break
        finally:
            if opened is not None:
                opened.close()
    return Worked(done, seconds, tokens, resumed, stopped and len(done) < todo.units)


def _make_folder(out: Path) -> None:
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out {out} cannot be written ({error.strerror}): name another") from error


def _write(out: Path, found: Evaluation) -> None:
    """Write the results and the page, print the groups' numbers, and remove the journal."""
    from glm_jax.evaluation import results
    from glm_jax.figures.evaluation import page
    from glm_jax.storage.files import write_atomic

    try:
        results.write(out, found)
        write_atomic(out / results.PAGE, page(found))
    except OSError as error:
        raise UserError(
            f"--out {out} cannot be written ({error.strerror}): fix that, and the same command resumes"
        ) from error
    (out / results.PART).unlink(missing_ok=True)
    for report in found.reports:
        for group, summaries in report.groups.items():
            for name, one in summaries.items():
                print(f"{report.task.name}\t{group}\t{name}\t{results.shown(name, one.weighted)}")
    common.say(f"written: {out / results.PAGE}")
