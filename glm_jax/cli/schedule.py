"""`glm-jax schedule`: draw a pipeline's timeline."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import get_args

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say
from glm_jax.config.training import Schedule
from glm_jax.errors import UserError


def run(arguments: Sequence[str]) -> int:
    """Draw a pipeline schedule: which stage works on which microbatch when, its bubble and its stash."""
    values = common.flag_values("schedule", "--stages 8 --microbatches 32")
    flags.DEFINE_enum("name", "1f1b", get_args(Schedule), "the schedule", flag_values=values)
    flags.DEFINE_integer("stages", 4, "stages of the pipeline", lower_bound=1, flag_values=values)
    flags.DEFINE_integer("microbatches", 8, "microbatches of a step", lower_bound=1, flag_values=values)
    common.define_path(values, "svg", "also write the drawing to this file")
    if not common.parse(values, arguments, []):
        return 0

    from glm_jax.parallel.pipeline.drawing import ascii_timeline, svg_timeline
    from glm_jax.parallel.pipeline.schedule import build
    from glm_jax.storage.files import write_atomic

    built = build(values.name, values.stages, values.microbatches)
    print(ascii_timeline(built), end="")
    if values.svg:
        try:
            write_atomic(Path(values.svg), svg_timeline(built))
        except OSError as error:
            raise UserError(f"--svg {values.svg} cannot be written ({error.strerror}): name another file") from error
        say(f"written: {values.svg}")
    return 0
