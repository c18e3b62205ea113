"""`glm-jax plan --search`: the best ways to run an experiment on a number of devices."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from glm_jax.cli.common import say
from glm_jax.errors import UserError
from glm_jax.planning.numbers import significant

if TYPE_CHECKING:
    from glm_jax.config import Experiment
    from glm_jax.planning.comparison import Compared
    from glm_jax.planning.search import Choice, Ranking
    from glm_jax.planning.targets import Target

SHOWN = 10  # choices of a table
LEAST = 0.01  # share of all sent bytes, below which an axis is not shown


def define(values: flags.FlagValues) -> None:
    """Add the flags of a search."""
    flags.DEFINE_bool(
        "search",
        False,
        "rank all meshes, microbatches, schedules and stashes, and compile the best",
        flag_values=values,
    )
    flags.DEFINE_integer("devices", None, "of a search: how many devices", lower_bound=1, flag_values=values)
    flags.DEFINE_integer(
        "top", 4, "of a search: how many choices are to fit as compiled", lower_bound=1, flag_values=values
    )


def check(values: flags.FlagValues) -> None:
    """Refuse flags that mean nothing here, or are missing."""
    for name in ("devices", "top"):
        if values[name].present and not values.search:
            raise UserError(f"--{name} is for --search: add it, or leave --{name} out")
    if values.search and values.devices is None:
        raise UserError("--search needs to know how many devices there are: add --devices, such as --devices 768")
    if values.search and values.inference:
        raise UserError("--search is for training: leave --inference out, or --search")


def run(
    values: flags.FlagValues, experiment: Experiment, target: Target, memory: int | None, sheets: tuple[Path, ...]
) -> int:
    """Search, print what is found, and return the exit code."""
    from glm_jax.planning import comparison, estimate, search
    from glm_jax.planning.compile import Request
    from glm_jax.planning.programs import pieces

    if target.slice_devices not in (None, values.devices):
        raise UserError(f"--target {target.name} has {target.slice_devices} devices, not {values.devices}: change "
                        "--devices or the slice")  # fmt: skip
    device = target.device or estimate.processor(*sheets)
    if device is estimate.PROCESSOR:
        raise UserError(
            "--search ranks by the speed of a device, and that of this CPU is not known: add --target, such as "
            "--target a100-40gb, or an entry cpu in a --sheet of your own"
        )
    memory = memory or device.memory
    count, processors = pieces(experiment), os.cpu_count() or 1
    say(f"estimating ways to run it on {values.devices:,} x {target.name}; each takes about a second")
    ranking = search.rank(experiment, values.devices, device, count, memory, top=values.top, processes=processors)
    if not values.json:
        print("\n".join(table(ranking, values.devices, target.name, memory)), flush=True)
    compared = list[comparison.Compared]()
    if values.compile and (ranking.choices or ranking.own):
        say(f"compiling for {target.name} until {values.top} fit; large models take a minute or two each")
        request = Request(experiment, values.target, sheets, memory)
        compared = comparison.compare(request, ranking, memory, values.top, max(1, processors // 2), say)
    if values.json:
        found = {"memory": memory, **ranking.to_json(), "compared": [one.to_json() for one in compared]}
        print(json.dumps({"search": found}))
    elif compared:
        print("\n".join(comparison_table(ranking, compared)))
    return 0


def table(ranking: Ranking, devices: int, target: str, memory: int) -> Iterator[str]:
    """Yield the lines about a ranking."""
    if not ranking.considered:
        yield f"no mesh of {devices:,} devices divides the model and the batch: try another number of --devices"
        return
    yield f"{ranking.considered:,} ways to run it on {devices:,} x {target} with {memory / 1e9:.2f} GB each; of these"
    for reason, count in ranking.left_out.items():
        yield f"  {count:6,} {reason}"
    yield f"  {len(ranking.choices):6,} are ranked"
    if ranking.choices:
        yield "by seconds a step if nothing overlaps (if everything does), with estimated GB a device:"
    for number, choice in enumerate(ranking.choices[:SHOWN], 1):
        yield f"  {number:4}  {_line(choice)}"
    yield _own(ranking, memory)


def _line(choice: Choice) -> str:
    plan = choice.plan
    return (
        f"{plan.slowest.step_seconds:8.4g} s ({plan.fastest.step_seconds:.4g})  {plan.memory.total / 1e9:6.2f} GB  "
        f"{choice.way}"
    )


def _own(ranking: Ranking, memory: int) -> str:
    own = ranking.own
    if own is None:
        return "the config's mesh is of another number of devices, so it has no rank"
    if own in ranking.choices:
        rank = f"ranks {ranking.place:,} of {len(ranking.choices):,}"
    else:
        rank = f"would rank {ranking.place:,}, but does not fit as estimated"
    return f"the config's own {rank}: {_line(own).strip()}"


def comparison_table(ranking: Ranking, compared: Sequence[Compared]) -> Iterator[str]:
    """Yield the lines about compiled choices."""
    from glm_jax.planning.comparison import ordered_alike
    from glm_jax.planning.remedies import shown

    first = compared[0].report
    yield f"compiled for {first.target} from shapes (jax {first.jax}); nothing ran"
    yield "as estimated / as compiled = ratio, of a device in a step:"
    yield f"  {'rank':>4}  {'peak, GB':24}  {'products, TFLOP':28}  {'sent, GB':28}"
    for one in compared:
        pairs = one.pairs()
        cells = [
            f"{significant(pair.estimated / unit, 4)} / {significant(pair.compiled / unit, 4)} = {pair.ratio:.3f}"
            for name, unit in (("peak", 1e9), ("FLOPs", 1e12), ("sent", 1e9))
            if (pair := pairs.get(name))
        ]
        fits = "fits" if one.verdict.fits else "does not fit"
        mine = ", the config's own" if one.choice == ranking.own else ""
        yield f"  {_place(ranking, one):4}  {cells[0]:24}  {''.join(f'{cell:28}  ' for cell in cells[1:])}{fits}{mine}"
    yield from _axes(compared)
    for one in compared:
        if (counted := one.report.counted) and counted.repeated:
            repeated = f"{significant(counted.repeated / 1e9, 4)} GB"
            yield f"  {_place(ranking, one):4}  of what it sends, XLA sends {repeated} again for want of memory"
    named = {"peak": "peaks", "FLOPs": "products", "sent": "sent bytes"}
    for name, text in named.items():
        alike, apart = ordered_alike([one.pairs()[name] for one in compared if name in one.pairs()])
        if apart:
            yield f"{text}: {alike} of {apart} pairs of choices, which differ by over 1%, are in the same order"
    best = next((one for one in compared if one.verdict.fits), None)
    if best is None:
        yield "none of them fits"
        return
    yield f"the first that fits: {shown(best.choice.way.changes())}"


def _place(ranking: Ranking, one: Compared) -> int | None:
    return ranking.place if one.choice == ranking.own else ranking.choices.index(one.choice) + 1


def _axes(compared: Sequence[Compared]) -> Iterator[str]:
    """Yield a line on what the first compiled choice sends along each axis."""
    one = next((one for one in compared if one.report.counted), None)
    if one is None or one.report.counted is None:
        return
    sent, estimated = one.report.counted.sent, one.choice.plan.sent
    large = [axes for axes, size in sent.items() if size > LEAST * sum(sent.values())]
    shown = ", ".join(
        f"{axes} {significant(estimated.get(axes, 0) / 1e9, 4)} / {significant(sent[axes] / 1e9, 4)}" for axes in large
    )
    if shown:
        yield f"sent by the first, GB by axis: {shown}"
