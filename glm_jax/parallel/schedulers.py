"""Whether a process is one of several; jax is not imported."""

from __future__ import annotations

import os
from collections.abc import Mapping

# Variables by which a scheduler tells a process that it is one of several, and those that hold the number of processes.
# jax reads the rest.
SCHEDULERS = {"SLURM_STEP_NODELIST": "SLURM_NTASKS", "OMPI_MCA_orte_hnp_uri": "OMPI_COMM_WORLD_SIZE"}


def scheduled(environment: Mapping[str, str]) -> bool:
    """Whether Slurm's srun, Open MPI's mpirun or a Cloud TPU slice started this process together with others."""
    for variable, count in SCHEDULERS.items():
        if variable in environment and int(environment.get(count, "1")) > 1:
            return True
    return environment.get("TPU_WORKER_HOSTNAMES", "").count(",") > 0


def joins(coordinator: str | None) -> bool:
    """Whether `processes.start` makes this process join others: a coordinator is named, or a scheduler started it."""
    return coordinator is not None or scheduled(os.environ)
