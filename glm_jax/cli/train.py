"""`glm-jax train`: train an experiment to its end."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glm_jax import signals
from glm_jax.cli import common, evaluators
from glm_jax.cli.common import say
from glm_jax.config import Experiment, with_changes
from glm_jax.errors import UserError, WorkFailed

if TYPE_CHECKING:
    from glm_jax.training.run import Run

DONE, STOPPED, FAILED = 0, 3, 4  # exit codes


def run(arguments: Sequence[str]) -> int:
    """Train an experiment; the same command resumes from the newest checkpoint."""
    values = common.flag_values("train", "--config quickstart --workdir runs/quickstart --config.train.steps=100")
    common.define_config(values)
    common.define_workdir(values)
    common.define_path(values, "replay", "an interventions.jsonl: make its changes at its steps")
    common.define_processes(values)
    if not common.parse(values, arguments, ["config", "workdir"]):
        return 0
    resolved = common.load(values)

    from glm_jax.parallel import schedulers
    from glm_jax.workdir import interventions

    if values.replay:
        planned = interventions.plan(interventions.read(Path(values.replay)))
        resolved = with_changes(resolved, {"interventions": planned})
    if not schedulers.joins(values.coordinator):
        _check_files(resolved, Path(values.workdir))

    from glm_jax.parallel import processes

    processes.start(values.coordinator, values.processes, values.process, resolved.mesh.collective_timeout)

    from glm_jax.training.run import Run

    workdir = Path(values.workdir)

    def train() -> int:
        run = Run(resolved, workdir, say, observers=evaluators.observers(resolved))
        finished = run.step >= resolved.train.steps
        return go(run, lambda: _show_fills(run, workdir, log=not finished))

    return processes.together(train)


def _check_files(config: Experiment, workdir: Path) -> None:
    """Refuse what the run would refuse, before jax is imported. One of several processes must tell the others."""
    from glm_jax.data.corpora.prepare import check_paths
    from glm_jax.workdir import folder

    config.check_sources()
    folder.check(workdir, config)
    check_paths(config)
    evaluators.check(config)


def go(run: Run, afterwards: Callable[[], None] = lambda: None) -> int:
    """Take all remaining steps, close the run and return the exit code; a signal stops it with a checkpoint.

    Args:
        run: as it was opened.
        afterwards: called when the last step is saved, unless there was a signal.

    Raises:
        UserError: the last step could not be saved.
    """
    asked = False

    def stop() -> None:
        nonlocal asked
        asked = True
        run.stop()

    with signals.listening(stop):  # to the end: no signal may change the exit code of what is saved
        try:
            with run:
                for _ in run.steps():
                    pass
        except WorkFailed as error:
            run.say(f"failed: {error}")
            return FAILED
        if unsaved := run.checkpoints.unsaved():
            raise UserError(f"step {run.step} could not be saved ({unsaved}): fix that, then the same command "
                            "resumes from the newest checkpoint")  # fmt: skip
        if run.step < run.current.train.steps:
            run.say(f"stopped: step {run.step} is saved in {run.workdir}; the same command resumes from there")
            return STOPPED
    if not asked:
        afterwards()
    return DONE


def _show_fills(run: Run, workdir: Path, *, log: bool) -> None:
    """Fill a few held-out blanks with what was trained, print them, and log them if asked. All processes must call."""
    from glm_jax.inference import Model, examples
    from glm_jax.inference.batch import NotFinite
    from glm_jax.parallel import processes
    from glm_jax.workdir.events import append

    model = Model.open(workdir, run.stretch.mesh)
    documents = {source: splits["heldout"] for source, splits in run.prepared.shards.items()}
    fills: list[examples.Example] = []
    try:
        for fill in examples.heldout(model, documents):
            if processes.is_first():
                print(fill.lines(run.prepared.languages[fill.source]), flush=True)
            fills.append(fill)
    except NotFinite as error:
        say(f"no blanks are filled: {error}")
    if log and processes.is_first():
        append(workdir, [{"event": "fill", "step": run.step, **fill._asdict()} for fill in fills])
