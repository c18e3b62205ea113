"""`glm-jax report`: show a run on one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from glm_jax.cli import common
from glm_jax.cli.common import say


def run(arguments: Sequence[str]) -> int:
    """Draw the curves and the events of a run on one page."""
    values = common.flag_values("report", "--workdir runs/quickstart --out report.html")
    common.define_workdir(values)
    out = "the file to write, .html or .png; by default report.html in the workdir"
    common.define_path(values, "out", out)
    if not common.parse(values, arguments, ["workdir"]):
        return 0

    from glm_jax.figures.report import write

    say(f"written: {write(Path(values.workdir), Path(values.out) if values.out else None)}")
    return 0
