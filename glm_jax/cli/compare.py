"""`glm-jax compare`: whether two evaluations differ."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glm_jax.cli import common


def run(arguments: Sequence[str]) -> int:
    """Compare two evaluations of the same tasks, item by item, with significance."""
    values = common.flag_values("compare", "scores-a scores-b")
    common.define_path(values, "first", "the folder of one evaluation; `compare A B` is short for --first A --second B")
    common.define_path(values, "second", "the folder of another")
    if not common.parse(values, arguments, ["first", "second"], nameless=["first", "second"]):
        return 0

    from glm_jax.evaluation import results

    found, apart = results.compare(Path(values.first), Path(values.second))
    rows: list[tuple[str, ...]] = [
        ("task", "group", "file", "measure", "items", "first", "second", "difference", "95% interval", "p")
    ]
    for (task, group, file, name), one in found.items():
        numbers = (results.shown(name, value) for value in (one.first, one.second, one.difference))
        rows.append((task, group, file, name, str(one.items), *numbers, results.interval(name, one), f"{one.p:.4f}"))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    for key in apart:
        common.say(f"not compared, as only one of the two has it with these items: {', '.join(key)}")
    return 0
