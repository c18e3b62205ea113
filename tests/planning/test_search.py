"""The search: its ways by brute force, its bounds, its ranking, and what it compiles, mostly without traces."""

import dataclasses
import itertools
from collections.abc import Iterable, Iterator
from fractions import Fraction

import pytest

from glm_jax.config import Experiment, default_config, resolve, with_changes
from glm_jax.parallel.device_sheet import Device, find
from glm_jax.parallel.pipeline import schedule
from glm_jax.planning import comparison, estimate, search
from glm_jax.planning.comparison import Pair, ordered_alike
from glm_jax.planning.compile import Memory, Report, Request
from glm_jax.planning.counted import Counted
from glm_jax.planning.search import Way

A100 = find("a100-40gb")
SMALL = resolve(
    default_config(),
    {
        "model.num_layers": 3, "model.hidden_size": 32, "model.num_heads": 4, "model.ffn_size": 48,
        "model.vocab_size": 960, "data.tokenizer.vocab_size": 900, "data.seq_length": 32,
        "train.global_batch": 12, "train.microbatches": 3, "mesh.data": 2, "mesh.pipeline": 2,
        "train.precision": "float16",
    },
)  # fmt: skip


def by_hand(devices: int) -> Iterator[Way]:
    """Yield the ways of SMALL by the rules, tried one by one."""
    sizes = range(1, devices + 1)
    for data, pipeline, tensor, count in itertools.product(sizes, sizes, sizes, range(1, 13)):
        divides = data * pipeline * tensor == devices and 12 % count == 0 and 12 // count % data == 0
        model = pipeline <= 3 and 4 % tensor == 0 and 48 % tensor == 0 and 960 % (pipeline * tensor) == 0
        if not (divides and model):
            continue
        for stash in ("layer", "stage", "products", "all"):
            if stash == "stage" and pipeline == 3:
                continue  # a stage is a layer
            yield Way(data, pipeline, tensor, count, "1f1b", stash)
            if pipeline > 1 and count < 2 * pipeline - 1:
                yield Way(data, pipeline, tensor, count, "gpipe", stash)


@pytest.mark.parametrize("devices, count", [(4, 8 + 16 + 24 + 24 + 32), (6, 8 + 12 + 20 + 21 + 30)])
def test_the_ways_are_those_of_a_hand_count(devices: int, count: int) -> None:
    found, left = search.ways(SMALL, devices, 900)
    assert set(found) == set(by_hand(devices)) and len(found) == len(set(found)) == count
    assert set(left) <= {search.SAME, search.WORSE}


def test_a_batch_ramp_and_zero_leave_ways_out() -> None:
    ramp = with_changes(SMALL, {"train.batch_ramp": (4, 4, 100)})
    found, left = search.ways(ramp, 4, 900)
    assert {12 // way.microbatches for way in found} == {1, 2, 4} and left[search.CONFIG] > 0
    split = with_changes(SMALL, {"mesh.zero": 3, "mesh.pipeline": 1, "pipeline.stash": "layer"})
    found, _ = search.ways(split, 4, 900)
    assert {(way.pipeline, way.stash) for way in found} == {(1, "layer"), (1, "stage")}


def test_the_own_way_has_its_stash_and_the_rest_of_the_devices() -> None:
    assert search.own(SMALL, 4, A100, 900) == Way(2, 2, 1, 3, "1f1b", "layer")  # of auto
    assert search.own(SMALL, 8, A100, 900) is None
    assert search.own(with_changes(SMALL, {"mesh.data": -1}), 8, A100, 900) == Way(4, 2, 1, 3, "1f1b", "layer")


@pytest.mark.parametrize(
    "way",
    [
        Way(2, 2, 1, 3, "1f1b", "layer"), Way(1, 2, 2, 1, "gpipe", "all"), Way(4, 1, 1, 3, "1f1b", "products"),
        Way(1, 3, 1, 12, "1f1b", "layer"),
    ],
    ids=str,
)  # fmt: skip
def test_bounds_are_below_the_estimates(way: Way) -> None:
    bounds, plan = search.Bounds(SMALL, A100, 900), estimate.plan(with_changes(SMALL, way.changes()), A100, 900)
    assert 0.2 * plan.memory.total < bounds.memory(way) <= plan.memory.total
    assert 0 < bounds.seconds(way) < plan.slowest.step_seconds


@pytest.fixture(scope="module", name="plan")
def _plan() -> estimate.Plan:
    return estimate.plan(SMALL, A100, 900)


def given(plan: estimate.Plan, seconds: float, memory: int) -> estimate.Plan:
    """Return a plan with other seconds and bytes."""
    slowest = dataclasses.replace(plan.slowest, step_seconds=seconds)
    return dataclasses.replace(plan, slowest=slowest, memory=dataclasses.replace(plan.memory, total=memory))


@pytest.fixture(name="speeds")
def _speeds(monkeypatch: pytest.MonkeyPatch, plan: estimate.Plan) -> None:
    """Let a step take as many seconds as there are microbatches, and a byte for each stage; `all` takes 100."""

    def planned(experiment: Experiment, device: Device, pieces: int) -> estimate.Plan:
        memory = 100 if experiment.pipeline.stash == "all" else experiment.mesh.pipeline
        return given(plan, experiment.train.microbatches, memory)

    monkeypatch.setattr(search.estimate, "plan", planned)
    monkeypatch.setattr(search.Bounds, "memory", lambda self, way: way.tensor)


@pytest.mark.usefixtures("speeds")
def test_choices_come_by_seconds_and_the_own_has_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(search.Bounds, "seconds", lambda self, way: way.microbatches - 0.5)
    ranking = search.rank(SMALL, 4, A100, 900, 3, top=4)
    places = [(choice.seconds, choice.plan.memory.total) for choice in ranking.choices]
    assert places == sorted(places) and places[-1][0] == 3  # what takes longer than the config's own is not estimated
    hand = [way for way in by_hand(4) if way.tensor < 4]
    assert ranking.left_out[search.FLOOR] == len(list(by_hand(4))) - len(hand)
    assert ranking.left_out[search.SLOW] == sum(way.microbatches > 3 for way in hand)
    assert ranking.left_out[search.LARGE] == sum(way.microbatches <= 3 and way.stash == "all" for way in hand)
    assert ranking.considered == len(ranking.choices) + sum(ranking.left_out.values())
    own = next(choice for choice in ranking.choices if choice.way == Way(2, 2, 1, 3, "1f1b", "layer"))
    assert ranking.own == own and ranking.place == ranking.choices.index(own) + 1
    monkeypatch.setattr(search.Bounds, "seconds", lambda self, way: 1e9)
    assert search.SLOW not in search.rank(SMALL, 4, A100, 900, 3, top=4).left_out  # else there are too few


@pytest.mark.usefixtures("speeds")
def test_an_own_way_that_does_not_fit_has_a_place() -> None:
    ranking = search.rank(with_changes(SMALL, {"pipeline.stash": "all"}), 4, A100, 900, 3, top=1)
    assert ranking.own and ranking.own not in ranking.choices
    assert ranking.place == 1 + sum(choice.seconds <= 3 for choice in ranking.choices)


@pytest.mark.usefixtures("speeds")
def test_an_own_way_that_is_like_another_is_counted_once() -> None:
    gpipe = with_changes(SMALL, {"mesh.data": 4, "mesh.pipeline": 1, "pipeline.schedule": "gpipe"})
    ranking = search.rank(gpipe, 4, A100, 900, 3, top=1)
    assert ranking.own in ranking.choices
    assert ranking.considered == len(ranking.choices) + sum(ranking.left_out.values())


@pytest.mark.usefixtures("speeds")
def test_it_compiles_down_the_ranking_until_enough_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    ranking, asked = search.rank(SMALL, 4, A100, 900, 3, top=2), list[str]()

    def reports(requests: Iterable[Request], processes: int) -> Iterator[Report]:
        for request in requests:
            asked.append(request.experiment.pipeline.stash)
            peak = 50 if len(asked) == 2 else 5  # the first choice does not fit
            yield Report("cpu", "step", {}, Memory(peak, 1, 1, 3), (), (), Counted(2.0, {}), 0.0, 0.0, 0, "")

    monkeypatch.setattr(comparison.worker, "reports", reports)
    found = comparison.compare(Request(SMALL), ranking, 10, 2)
    assert len(asked) == 4 and [one.verdict.fits for one in found] == [False, True, True, True]
    assert [one.choice for one in found] == [*ranking.choices[:3], ranking.own]
    assert set(found[0].pairs()) == {"peak", "FLOPs", "sent"} and found[0].pairs()["peak"].compiled == 50


def test_pairs_that_differ_by_little_are_not_told_apart() -> None:
    pairs = [Pair(1, 100), Pair(2, 100.5), Pair(3, 200), Pair(1.5, 300)]
    # 100 < 200, 100 < 300, 100.5 < 200 are alike; 100.5 < 300 and 200 < 300 are not
    assert ordered_alike(pairs) == (3, 5)
    assert Pair(1, 4).ratio == 0.25 and Pair(0, 0).ratio == 1


def test_the_bubble_that_a_bound_takes_is_the_schedule_s() -> None:
    for stages, count in ((2, 1), (3, 12), (4, 5)):
        bubble = schedule.build("1f1b", stages, count).bubble
        assert 1 / (1 - bubble) == 1 + Fraction(stages - 1, count)
