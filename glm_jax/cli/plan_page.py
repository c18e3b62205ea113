"""`glm-jax plan --html`: a plan as one page."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from absl import flags

from glm_jax.cli import common
from glm_jax.errors import UserError

if TYPE_CHECKING:
    from glm_jax.config import Experiment
    from glm_jax.planning.compile import Report, Verdict
    from glm_jax.planning.estimate import Plan
    from glm_jax.planning.remedies import Remedy
    from glm_jax.planning.targets import Target


class Draw(Protocol):
    """Write the page of a plan if it is asked for, see `write`."""

    def __call__(
        self,
        estimate: Plan | None,
        programs: Sequence[tuple[Report, Verdict | None]] = (),
        remedies: Sequence[Remedy] = (),
    ) -> None: ...


def define(values: flags.FlagValues) -> None:
    """Add `--html`."""
    common.define_path(values, "html", "also draw the plan on a page, this file, which needs no other")


def check(values: flags.FlagValues) -> None:
    """Check that the page can be made, before anything is compiled for it.

    Raises:
        UserError: the file's name is not that of a page, there are many plans, or matplotlib is not installed.
    """
    if not values.html:
        return
    if values.search:
        raise UserError("--html draws one mesh: leave out --search, and give the flags of the mesh that it finds")
    if values.inference == "any":
        raise UserError("--html draws one mesh: give --inference one of the weights that `any` finds, and the mesh")
    if values.inference and not values.compile:
        raise UserError("--html draws the compiled programs of --inference: leave --nocompile out, or --html")
    if Path(values.html).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--html {values.html} is no page: end its name in .html")
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        raise UserError("--html needs matplotlib: pip install -e '.[plots]'") from error


def write(
    values: flags.FlagValues,
    arguments: Sequence[str],
    target: Target,
    memory: int | None,
    experiment: Experiment,
    estimate: Plan | None,
    programs: Sequence[tuple[Report, Verdict | None]] = (),
    remedies: Sequence[Remedy] = (),
) -> None:
    """Write the page if the flags ask for it, over an older one; see `figures.plan.Planned`.

    Raises:
        UserError: the file cannot be written.
    """
    if not values.html:
        return

    from glm_jax.figures.plan import Planned, page
    from glm_jax.storage.files import write_atomic

    node = target.device.node if target.device else None
    command = shlex.join(["glm-jax", "plan", *arguments])
    made = page(Planned(values.config, experiment, target.name, node, memory, command, estimate, programs, remedies))
    try:
        write_atomic(Path(values.html), made)
    except OSError as error:
        raise UserError(f"--html {values.html} cannot be written ({error.strerror}): name another file") from error
    common.say(f"written: {values.html}")
