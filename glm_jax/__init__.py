"""GLM-130B in JAX: blank infilling, trained on a data x pipeline x tensor mesh.

The front door in Python, without the command line:

    import glm_jax

    run = glm_jax.load("quickstart", "runs/mine", **{"train.steps": 20})
    for step in run.steps():
        print(step.number, step.loss)

docs/library.md shows more. JAX is imported only when it is needed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

    import optax

    from glm_jax.config.experiment import Config, Experiment
    from glm_jax.training.observers import Observer as Observer
    from glm_jax.training.run import Run

    __version__: str

__all__ = ["Observer", "load"]


def load(
    experiment: str | Path | Config | Experiment,
    workdir: str | Path | None = None,
    *,
    optimizer: optax.GradientTransformation | None = None,
    say: Callable[[str], None] = print,
    **overrides: object,
) -> Run:
    """Return the run of an experiment, with its data prepared, at its newest checkpoint or at the start.

    Args:
        experiment: a name such as `quickstart`, a file, what its `get_config()` returns, or a resolved `Experiment`.
        workdir: the folder for everything the run makes, like `--workdir`; None for a temporary one, which is deleted
            when the run is closed.
        optimizer: any optax transformation, to replace the experiment's AdamW.
        say: called with one line for each thing done.
        overrides: values by dotted key: `**{"train.steps": 20}`.

    Raises:
        UserError: the experiment, a key or a value is invalid, or data and devices do not fit.
    """
    import atexit
    import tempfile
    import weakref

    from glm_jax.cli import evaluators, experiments
    from glm_jax.config import with_changes
    from glm_jax.config.fields import local_path
    from glm_jax.errors import UserError
    from glm_jax.parallel import processes
    from glm_jax.training.run import Run

    resolved = experiments.resolved(experiment)
    if overrides:
        resolved = with_changes(resolved, overrides)
    if workdir is None and not processes.alone():
        raise UserError("a run of several processes needs a workdir that all of them share: name one")
    temporary = tempfile.TemporaryDirectory(prefix="glm_jax-") if workdir is None else None
    folder = local_path(temporary.name if temporary else workdir or "", "the workdir")
    run = Run(resolved, folder, say, optimizer, evaluators.observers(resolved))
    if temporary:
        run.closing.callback(temporary.cleanup)
    living = weakref.ref(run)
    atexit.register(lambda: (left := living()) and left.close())  # a run left open must not lose what it saves
    return run


def __getattr__(name: str) -> object:
    if name == "__version__":
        import importlib.metadata

        return importlib.metadata.version("glm-jax")
    if name == "Observer":
        from glm_jax.training.observers import Observer

        return Observer
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
