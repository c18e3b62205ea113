"""Changes that let a program fit: each is applied, compiled and measured."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass

from glm_jax.config import Experiment, with_changes
from glm_jax.engine import build
from glm_jax.errors import UserError
from glm_jax.planning import worker
from glm_jax.planning.compile import Report, Request, Verdict, verdict

Changes = Mapping[str, object]  # values by dotted key
STASHES = ("all", "products", "layer", "stage")  # each takes less memory than the one before
ROUNDS = 3  # of changes on top of changes


@dataclass(frozen=True)
class Remedy:
    """Changes of an experiment, and what they come to.

    Attributes:
        changes: values by dotted key.
        report: of the changed program.
        verdict: on it.
        cost: seconds a step, as estimated; None without an estimate.
    """

    changes: Changes
    report: Report
    verdict: Verdict
    cost: float | None


def single(experiment: Experiment) -> Iterator[Changes]:
    """Yield the smallest change of each kind that lowers the memory of a device, on the same number of devices.

    They are another schedule, a smaller stash, fewer rows a microbatch, weights split over `data`, more stages, and
    more shards of a layer. Those that do not fit the model or the batch are left out.
    """
    mesh, train, stash = experiment.mesh, experiment.train, experiment.pipeline.stash
    if experiment.pipeline.schedule == "gpipe":
        yield from _possible(experiment, {"pipeline.schedule": "1f1b"})
    if stash == "auto":
        stash = "products" if mesh.pipeline == 1 and mesh.zero == 1 else "layer"
    for smaller in STASHES[STASHES.index(stash) + 1 :][:1]:
        yield from _possible(experiment, {"pipeline.stash": smaller})
    rows = train.global_batch // train.microbatches // mesh.data
    factors = (factor for factor in range(2, rows + 1) if rows % factor == 0)
    for factor in [*factors][:1]:
        yield from _possible(experiment, {"train.microbatches": train.microbatches * factor})
    if mesh.zero == 1 and mesh.data > 1:
        stash = {} if experiment.pipeline.stash in ("auto", "layer", "stage") else {"pipeline.stash": "layer"}
        yield from _possible(experiment, {"mesh.zero": 3, **stash})
    for axis in ("pipeline", "tensor"):
        if mesh.data % 2 == 0:  # as many rows a device as before
            shape = {"mesh.data": mesh.data // 2, f"mesh.{axis}": getattr(mesh, axis) * 2}
            yield from _possible(experiment, {**shape, "train.microbatches": train.microbatches * 2})


def search(
    request: Request,
    report: Report,
    memory: int,
    cost: Callable[[Experiment], float] | None = None,
    processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Remedy]:
    """Return the smallest changes by which a training step fits, the cheapest first.

    If no single change is enough, those that lower the peak most are made together, and the search continues from
    there. If that is not enough either, the result holds the changes of the last round, the lowest peak first.

    Args:
        request: of the step that does not fit.
        report: of it.
        memory: bytes of a device.
        cost: seconds a step; without it, changes stay in the order of `single`.
        processes: that compile at a time.
        say: called with a line for each program that is compiled.
    """
    made: dict[str, object] = {}
    tried, lowest = list[Remedy](), report.memory.peak
    for _ in range(ROUNDS):
        experiment = with_changes(request.experiment, made)
        offered = [{**made, **changes} for changes in single(experiment)]
        found = list(_compiled(request, offered, memory, cost, processes, say))
        if fitting := [remedy for remedy in found if remedy.verdict.fits]:
            return sorted(fitting, key=lambda remedy: remedy.cost or 0)
        lower = [remedy for remedy in found if remedy.report.memory.peak < lowest]
        if not lower:
            break
        tried = sorted(lower, key=lambda remedy: remedy.report.memory.peak)
        made, lowest = dict(tried[0].changes), tried[0].report.memory.peak
    return tried


def _possible(experiment: Experiment, changes: Changes) -> Iterator[Changes]:
    """Yield changes if the changed experiment is valid and fits its mesh."""
    try:
        build(with_changes(experiment, changes), abstract=True)
    except (UserError, ValueError):
        return
    yield changes


def _compiled(
    request: Request,
    offered: Sequence[Changes],
    memory: int,
    cost: Callable[[Experiment], float] | None,
    processes: int,
    say: Callable[[str], None],
) -> Iterator[Remedy]:
    changed = [with_changes(request.experiment, changes) for changes in offered]
    requests = [dataclasses.replace(request, experiment=experiment) for experiment in changed]
    reports = worker.reports(requests, processes)
    for index, (changes, experiment, report) in enumerate(zip(offered, changed, reports, strict=True), 1):
        say(f"{index} of {len(offered)}: {shown(changes)}: {report.memory.peak / 1e9:.2f} GB")
        yield Remedy(changes, report, verdict(report, memory), cost(experiment) if cost else None)


def shown(changes: Changes) -> str:
    """Return changes as flags of the command line."""
    return " ".join(f"--config.{key}={value}" for key, value in changes.items())
