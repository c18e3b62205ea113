"""The best choices of a search, compiled, and what their estimates are worth."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable, Iterator, Sequence

from glm_jax.config import with_changes
from glm_jax.planning import worker
from glm_jax.planning.compile import Report, Request, Verdict, verdict
from glm_jax.planning.search import Choice, Ranking
from glm_jax.types import Json

CLOSE = 0.01  # two numbers that differ by less are not told apart


@dataclasses.dataclass(frozen=True)
class Pair:
    """A number as estimated and as compiled."""

    estimated: float
    compiled: float

    @property
    def ratio(self) -> float:
        """The estimate as a share of what was compiled; 1 if both are nothing."""
        return self.estimated / self.compiled if self.compiled else 1.0 if not self.estimated else float("inf")


@dataclasses.dataclass(frozen=True)
class Compared:
    """A choice beside its compiled program.

    Attributes:
        choice: of a search.
        report: of its program.
        verdict: on it.
    """

    choice: Choice
    report: Report
    verdict: Verdict

    def pairs(self) -> dict[str, Pair]:
        """Return bytes of the peak, products' operations and sent bytes, of a device and a step.

        The last two are left out if the compiler refused the program.
        """
        plan, counted = self.choice.plan, self.report.counted
        found = {"peak": Pair(plan.memory.total, self.report.memory.peak)}
        if counted is not None:
            found["FLOPs"] = Pair(plan.device_flops, counted.flops)
            found["sent"] = Pair(sum(plan.sent.values()), sum(counted.sent.values()))
        return found

    def to_json(self) -> Json:
        """Return the comparison as plain values, for JSON."""
        ratios = {name: pair.ratio for name, pair in self.pairs().items()}
        return {
            **self.choice.to_json(),
            "compiled": self.report.to_json(),
            "verdict": dataclasses.asdict(self.verdict),
            "ratios": ratios,
        }


def compare(
    request: Request,
    ranking: Ranking,
    memory: int,
    top: int,
    processes: int = 1,
    say: Callable[[str], None] = lambda line: None,
) -> list[Compared]:
    """Compile the first choices until `top` of them fit, and the config's own, and return them in their order.

    Args:
        request: of the experiment.
        ranking: of its choices.
        memory: bytes of a device.
        top: how many are to fit as compiled.
        processes: that compile at a time.
        say: called with a line for each program that is compiled.

    Raises:
        UserError: the number of devices is not that of the target.
        WorkFailed: a compiler failed.
    """
    found, fitting = list[Compared](), 0
    mine = ranking.own
    last = [mine] if mine and mine not in ranking.choices[:top] else []

    def offered() -> Iterator[Choice]:
        yield from last
        for choice in ranking.choices:
            if fitting >= top:
                return
            if choice not in last:
                yield choice

    choices, again = itertools.tee(offered())
    requests = (
        dataclasses.replace(request, experiment=with_changes(request.experiment, choice.way.changes()))
        for choice in choices
    )
    for report in worker.reports(requests, processes):
        choice = next(again)
        judged = verdict(report, memory)
        fitting += judged.fits and choice not in last
        found.append(Compared(choice, report, judged))
        word = "fits" if judged.fits else "does not fit"
        say(f"{len(found)} compiled: {choice.way}: {report.memory.peak / 1e9:.2f} GB {word}")
    order = {choice.way: number for number, choice in enumerate(ranking.choices)}
    return sorted(found, key=lambda one: order.get(one.choice.way, len(order)))


def ordered_alike(pairs: Sequence[Pair]) -> tuple[int, int]:
    """Return how many couples estimates order as compiled numbers do, and of how many that these tell apart."""
    alike = apart = 0
    for one, other in itertools.combinations(pairs, 2):
        if abs(one.compiled - other.compiled) <= CLOSE * max(one.compiled, other.compiled):
            continue
        apart += 1
        alike += (one.estimated - other.estimated) * (one.compiled - other.compiled) > 0
    return alike, apart
