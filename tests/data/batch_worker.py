"""One of several processes that make a run's batches: `python batch_worker.py RANK DIRECTORY` writes its shares."""

import random
import sys
from pathlib import Path

import numpy as np
from rows import build

from glm_jax.config.data import BlankOptions

STEPS, GLOBAL_BATCH, WORLDS = (0, 1, 10, 10_000_000), 16, (1, 2, 4)


def make():
    """Return the batches that every process of the run builds."""
    options = BlankOptions(mask_segments=2, short_seq_prob=0.1, single_span_prob=0.1)
    return build(seq_length=64, options=options)


def share(rank, world):
    """Return which rows of a batch a process makes: its part of each of two microbatches."""
    rows = np.arange(GLOBAL_BATCH).reshape(2, world, -1)  # [M, processes, B / M / processes]
    return rows[:, rank].reshape(-1)


def main(rank, directory):
    batches = make()
    tasks = [(world, step) for world in WORLDS if rank < world for step in STEPS]
    random.Random(rank).shuffle(tasks)  # each process in its own order
    for world, step in tasks:
        batch = batches.batch_at(step, GLOBAL_BATCH, share(rank, world))
        np.savez(directory / f"{world}-{step}-{rank}.npz", **batch._asdict())  # pyright: ignore[reportArgumentType]


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
