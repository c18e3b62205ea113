"""Write the tables of a results page from the results of sweeps.

    python -m glm_jax.sweeps.page docs/ablations.md experiments/ablations/results

The table of the sweep in the results' folder `norms` goes between `<!-- norms: begin -->` and `<!-- norms: end -->` of
the page; the text around it stays as it is.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

from glm_jax.errors import UserError
from glm_jax.storage.files import write_atomic
from glm_jax.sweeps.frontier import breaking_table, frontier_table
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
    return f"{provenance(description, len(rows))}.\n\n{_table(rows)}"


def _table(rows: list[Row]) -> str:
    if not rows:
        return ""
    if "broke" in rows[0]:
        return breaking_table(rows)
    return frontier_table(rows) if "lr" in rows[0]["labels"] else summary(rows) + _second_half(rows)


def _second_half(rows: list[Row]) -> str:
    """Return the losses on second halves as well, if members differ in their objectives."""
    if "objective" not in rows[0]["labels"]:
        return ""
    halves = [{**row, "heldout": {"loss": row["heldout"].get("loss/second_half")}} for row in rows]
    return f"\n\nThe same, with the held-out loss on the second half of a text given the first:\n\n{summary(halves)}"


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
