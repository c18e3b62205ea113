"""Write the tables of a results page from the results of sweeps.

    python -m glm_jax.sweeps.page docs/ablations.md experiments/ablations/results

The table of the sweep in the results' folder `norms` goes between `<!-- norms: begin -->` and `<!-- norms: end -->` of
the page; the text around it stays as it is.
"""

from __future__ import annotations

import json
import math
import re
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic
from glm_jax.sweeps.frontier import breaking_table, frontier_table, learnt, sensitivity_table
from glm_jax.sweeps.paired import comparisons
from glm_jax.sweeps.results import RESULTS, Row, provenance, read_description, summary


def section(workdir: Path) -> str:
    """Return a sweep's part of the page: the source of its numbers, then its table.

    Raises:
        UserError: the folder holds no sweep, or no results.
    """
    description = read_description(workdir)
    try:
        rows: list[Row] = json.loads((workdir / RESULTS).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{workdir / RESULTS} cannot be read: run the sweep again, which rewrites it") from error
    said = textwrap.fill(f"{provenance(description, rows)}.", 120, break_on_hyphens=False, break_long_words=False)
    return f"{said}\n\n{_table(rows)}"


def _table(rows: list[Row]) -> str:
    if not rows:
        return ""
    if "broke" in rows[0]:
        said = "The logarithm of these rates to the base 10, without those in brackets and members that did not break"
        return f"{breaking_table(rows)}\n\n{said}:\n\n{comparisons(rows, _broke)}"
    labels = rows[0]["labels"]
    if [axis for axis in labels if axis != "seed"] == ["objective"]:
        return summary(rows) + _second_half(rows)
    parts = [frontier_table(rows) if "lr" in labels else summary(rows)]
    if "width" in labels:
        parts.append(f"Sensitivity to the learning rate:\n\n{sensitivity_table(rows)}")
    parts.append(f"Held-out loss, of pairs that both finished:\n\n{comparisons(rows, _heldout())}")
    if "instructions" in labels:
        names = sorted({name for row in rows for name in row["heldout"] if name.startswith("loss/")})
        said = "of pairs that both finished"
        parts += [f"Held-out `{name}`, {said}:\n\n{comparisons(rows, _heldout(name))}" for name in names]
    return "\n\n".join(parts)


def _heldout(name: str = "loss") -> Callable[[Row], float | None]:
    """Return what reads a held-out loss of a member that finished."""
    return lambda row: row["heldout"].get(name) if row["status"] == "finished" else None


def _broke(row: Row) -> float | None:
    """Return the logarithm of the rate at which a member broke that had learnt something, to the base 10."""
    return math.log10(row["broke"]["lr"]) if row["broke"] and learnt(row) else None


def _second_half(rows: list[Row]) -> str:
    """Return the losses on second halves as well: members with different objectives have no other in common."""
    halves = [{**row, "heldout": {"loss": row["heldout"].get("loss/second_half")}} for row in rows]
    said = "The same, with the held-out loss on the second half of a text given the first"
    return f"\n\n{said}:\n\n{summary(halves)}\n\n{comparisons(halves, _heldout())}"


def write_page(page: Path, results: Path) -> list[str]:
    """Put the tables of all sweeps under `results` in their places on a page, and return the sweeps' names.

    Raises:
        UserError: the page has no place for one of them, or cannot be read.
    """
    try:
        text = page.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{page} cannot be read: is the path right?") from error
    names = sorted(folder.parent.name for folder in results.glob("*/sweep.json"))
    for name in names:
        place = re.compile(f"(<!-- {re.escape(name)}: begin -->\n).*?(<!-- {re.escape(name)}: end -->)", re.DOTALL)
        if len(place.findall(text)) != 1:
            raise UserError(f"{page} needs one place for {name}: <!-- {name}: begin --> and <!-- {name}: end -->")
        written = section(results / name)
        text = place.sub(lambda match, written=written: f"{match[1]}\n{written}\n\n{match[2]}", text)
    write_atomic(page, text)
    return names


if __name__ == "__main__":
    try:
        print("\n".join(write_page(Path(sys.argv[1]), Path(sys.argv[2]))))
    except UserError as mistake:
        sys.exit(f"error: {mistake}")
