"""The search for changes by which a step fits, on peaks that are given instead of compiled."""

from collections.abc import Iterable, Iterator

import pytest

from glm_jax.config import Experiment, by_key, default_config, resolve
from glm_jax.planning import remedies
from glm_jax.planning.compile import Memory, Report, Request


def experiment(**changes: object) -> Experiment:
    """Return 4 layers on data=4 x pipeline=2 with 2 rows a device and microbatch."""
    shape = {"model.num_layers": 4, "model.vocab_size": 16384, "mesh.data": 4, "mesh.pipeline": 2}
    return resolve(default_config(), {**shape, "train.global_batch": 32, "train.microbatches": 4, **changes})


def report(peak: float) -> Report:
    """Return the report of a program of which only the peak matters."""
    return Report("cpu", "step", {}, Memory(int(peak), 0, 0, 0), (), (), None, 0.0, 0.0, 0, "")


def test_each_kind_of_change_is_the_smallest_that_is_possible() -> None:
    assert list(remedies.single(experiment(**{"pipeline.schedule": "gpipe"}))) == [
        {"pipeline.schedule": "1f1b"},
        {"pipeline.stash": "stage"},
        {"train.microbatches": 8},
        {"mesh.data": 2, "mesh.pipeline": 4, "train.microbatches": 8},
        {"mesh.data": 2, "mesh.tensor": 2, "train.microbatches": 8},
    ]  # mesh.zero=3 cannot be combined with stages
    one_stage = {"mesh.pipeline": 1, "pipeline.stash": "products", "train.microbatches": 8, "model.num_layers": 1}
    assert list(remedies.single(experiment(**one_stage))) == [
        {"pipeline.stash": "layer"},
        {"mesh.zero": 3, "pipeline.stash": "layer"},
        {"mesh.data": 2, "mesh.tensor": 2, "train.microbatches": 16},
    ]  # one layer fills no second stage


def search(monkeypatch: pytest.MonkeyPatch, saved: dict[str, float], memory: float) -> list[remedies.Remedy]:
    """Search where each change of `saved`, by its last key and value, saves so much of a peak of 100."""
    began = experiment()

    def peak(changed: Experiment) -> float:
        differs = {key: value for key, value in by_key(changed).items() if by_key(began)[key] != value}
        return 100 - sum(size for name, size in saved.items() if name in {f"{k}={v}" for k, v in differs.items()})

    def reports(requests: Iterable[Request], processes: int) -> Iterator[Report]:
        return (report(peak(request.experiment)) for request in requests)

    monkeypatch.setattr(remedies.worker, "reports", reports)
    return remedies.search(
        Request(began), report(100), int(memory), cost=lambda changed: 1.0 + (changed.pipeline.stash == "stage")
    )


def test_single_changes_that_fit_come_by_cost(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, {"pipeline.stash=stage": 30, "mesh.tensor=2": 20}, memory=80)
    assert [(dict(one.changes), one.report.memory.peak, one.cost) for one in found] == [
        ({"mesh.data": 2, "mesh.tensor": 2, "train.microbatches": 8}, 80, 1.0),
        ({"pipeline.stash": "stage"}, 70, 2.0),
    ]


def test_changes_are_combined_if_none_is_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, {"pipeline.stash=stage": 30, "mesh.tensor=2": 20}, memory=50)
    assert [(dict(one.changes), one.verdict.fits) for one in found] == [
        ({"pipeline.stash": "stage", "mesh.data": 2, "mesh.tensor": 2, "train.microbatches": 8}, True)
    ]


def test_what_helps_is_shown_if_it_is_not_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    found = search(monkeypatch, {"pipeline.stash=stage": 30}, memory=50)
    assert [(one.report.memory.peak, one.verdict.margin) for one in found] == [(70, -20)]
    assert search(monkeypatch, {}, memory=50) == []
