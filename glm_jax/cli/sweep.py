"""`glm-jax sweep`: train the members of an ablation."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from glm_jax.cli import common
from glm_jax.cli.common import say


def run(arguments: Sequence[str]) -> int:
    """Train the members of an ablation together, and collect their results; the same command resumes."""
    values = common.flag_values("sweep", "--config ablations/norms --workdir runs/norms")
    common.define_config(values)
    common.define_workdir(values)
    cores = os.cpu_count() or 1
    flags.DEFINE_integer(
        "parallel", cores, "processes at a time, with one core each", lower_bound=1, flag_values=values
    )
    flags.DEFINE_string(
        "only", "", "labels, such as num_layers=48,seed=1: only the groups with a member that has all of them",
        flag_values=values,
    )  # fmt: skip
    flags.DEFINE_bool("dry-run", False, "list the members without training them", flag_values=values)
    if not common.parse(values, arguments, ["config"]):
        return 0
    lists = values["dry-run"].value
    if not lists:
        common.require(values, ["workdir"])
    resolved = common.load(values)
    path = common.experiment_file(values)

    from glm_jax.sweeps.run import listing, train_all

    if lists:
        for line in listing(resolved, path, values.only):
            print(line)
        return 0
    return train_all(resolved, path, Path(values.workdir), values.parallel, say, values.only)
