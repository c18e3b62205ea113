"""The stability frontier of a sweep over learning rates: the highest rate up to which no member diverged."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence

from glm_jax.sweeps.results import Row, spread, table
from glm_jax.sweeps.verdict import LEARNT

Settings = tuple[str, ...]  # labels of all axes but the learning rate and the seed


def settings(row: Row, rate: str = "lr") -> Settings:
    """Return the labels of a row, without its learning rate and its seed."""
    return tuple(label for axis, label in row["labels"].items() if axis not in (rate, "seed"))


def frontier(rows: Sequence[Row], rate: str = "lr") -> dict[Settings, dict[str, float | None]]:
    """Return, for each setting and seed, the highest learning rate of the grid up to which no member diverged.

    Args:
        rows: of results.json; a setting that still lacks rates is left out.
        rate: the axis of the learning rates; its labels are numbers.

    Returns:
        setting -> seed -> the rate; None where even the lowest rate diverged.
    """
    rates = sorted({row["labels"][rate] for row in rows}, key=float)
    found: dict[Settings, dict[str, dict[str, bool]]] = {}
    for row in rows:
        seeds = found.setdefault(settings(row, rate), {})
        seeds.setdefault(row["labels"]["seed"], {})[row["labels"][rate]] = row["status"] == "finished"
    return {
        setting: {seed: _highest(rates, stable) for seed, stable in seeds.items()}
        for setting, seeds in found.items()
        if all(len(stable) == len(rates) for stable in seeds.values())
    }


def _highest(rates: Sequence[str], stable: Mapping[str, bool]) -> float | None:
    highest = None
    for rate in rates:
        if not stable[rate]:
            break
        highest = float(rate)
    return highest


def frontier_table(rows: Sequence[Row], rate: str = "lr") -> str:
    """Return a table by setting: the frontier of each seed, and held-out loss by rate with its spread over seeds.

    Where seeds diverged, their number comes before the loss of the others.
    """
    rates = sorted({row["labels"][rate] for row in rows}, key=float)
    axes = [axis for axis in rows[0]["labels"] if axis not in (rate, "seed")]
    lines = []
    for setting, seeds in frontier(rows, rate).items():
        highest = " / ".join("none" if value is None else f"{value:g}" for value in seeds.values())
        mine = [row for row in rows if settings(row, rate) == setting]
        lines.append([*setting, highest, *(_cell([row for row in mine if row["labels"][rate] == r]) for r in rates)])
    return table([*axes, "highest stable rate, by seed", *(f"loss at {r}" for r in rates)], lines)


def sensitivity(rows: Sequence[Row], rate: str = "lr") -> dict[Settings, list[float]]:
    """Return for each setting, by seed, its sensitivity to the learning rate (arXiv 2309.14322) in nats a token.

    It is the mean over the grid's rates of the held-out loss less the lowest of them. A member that diverged counts as
    guessing by the targets' frequencies, and so does one with a loss above that. A seed that lacks rates is left out.
    """
    count = len({row["labels"][rate] for row in rows})
    found: dict[Settings, dict[str, list[float]]] = {}
    for row in rows:
        guess = row["unigram"]
        loss = min(row["heldout"].get("loss") or guess, guess) if row["status"] == "finished" else guess
        found.setdefault(settings(row, rate), {}).setdefault(row["labels"]["seed"], []).append(loss)
    return {
        setting: [statistics.fmean(losses) - min(losses) for losses in seeds.values() if len(losses) == count]
        for setting, seeds in found.items()
    }


def sensitivity_table(rows: Sequence[Row], rate: str = "lr") -> str:
    """Return a table of the sensitivity of each setting, with its spread over seeds."""
    axes = [axis for axis in rows[0]["labels"] if axis not in (rate, "seed")]
    found = sensitivity(rows, rate)
    return table([*axes, "sensitivity"], [[*setting, spread(values)] for setting, values in found.items()])


def _cell(rows: Sequence[Row]) -> str:
    losses = [row["heldout"]["loss"] for row in rows if row["status"] == "finished" and row["heldout"].get("loss")]
    diverged = sum(row["status"] == "diverged" for row in rows)
    parts = [f"{diverged} diverged"] if diverged else []
    return "; ".join(parts + [spread(losses)] * bool(losses))


def learnt(row: Row) -> bool:
    """Whether a member with stairs had learnt something before them, by the rule's margin."""
    loss = row["loss_before_stairs"]  # None if none was finite
    return loss is not None and loss < row["unigram"] - LEARNT


def breaking_table(rows: Sequence[Row]) -> str:
    """Return a table of the rates at which trained members broke on their stairs, by setting, a column a seed.

    The rate of one that had learnt nothing before its stairs is in brackets: it says nothing about stability.
    """
    seeds = list(dict.fromkeys(row["labels"]["seed"] for row in rows))
    axes = [axis for axis in rows[0]["labels"] if axis != "seed"]
    found: dict[tuple[str, ...], dict[str, str]] = {}
    for row in rows:
        rate = "not broken" if row["broke"] is None else f"{row['broke']['lr']:.3g}"
        rate = rate if learnt(row) else f"({rate})"
        found.setdefault(tuple(row["labels"][axis] for axis in axes), {})[row["labels"]["seed"]] = rate
    lines = [[*setting, *(rates.get(seed, "") for seed in seeds)] for setting, rates in found.items()]
    return table([*axes, *(f"seed {seed}" for seed in seeds)], lines)
