"""The global batch is the same for any number of processes, in any order, after a restart, at any step, on any ramp."""

import collections
import hashlib
import os
import subprocess
import sys
from pathlib import Path

import batch_worker
import numpy as np
import pytest
from rows import Documents, build, check_row, least_cpu_seconds

import glm_jax
from glm_jax.config.data import BlankOptions
from tests.patience import HANG


def digest(batch):
    """Return the sha256 of everything in a batch."""
    made = hashlib.sha256()
    for name in sorted(batch):
        made.update(f"{name} {batch[name].dtype} {batch[name].shape}".encode() + batch[name].tobytes())
    return made.hexdigest()


def join(parts, world):
    """Join the shares of all processes in the order of the batch."""
    order = np.argsort(np.concatenate([batch_worker.share(rank, world) for rank in range(world)]))
    return {name: np.concatenate([part[name] for part in parts])[order] for name in parts[0]}


@pytest.mark.slow
def test_the_batch_of_a_step_is_the_same_for_any_number_of_processes(tmp_path):
    """Run four real processes, which form worlds of one, two and four. Each takes the steps in its own order."""
    root = Path(glm_jax.__file__).parents[1]
    paths = os.pathsep.join([str(root), os.environ.get("PYTHONPATH", "")])
    running = [
        subprocess.Popen(
            [sys.executable, batch_worker.__file__, str(rank), str(tmp_path)], env={**os.environ, "PYTHONPATH": paths}
        )
        for rank in range(4)
    ]
    assert [process.wait(timeout=HANG) for process in running] == [0] * 4
    here = batch_worker.make()
    for step in batch_worker.STEPS:
        expected = digest(here.batch_at(step, batch_worker.GLOBAL_BATCH)._asdict())
        for world in batch_worker.WORLDS:
            parts = [dict(np.load(tmp_path / f"{world}-{step}-{rank}.npz")) for rank in range(world)]
            assert digest(join(parts, world)) == expected, (world, step)
    assert len({digest(here.batch_at(step, batch_worker.GLOBAL_BATCH)._asdict()) for step in batch_worker.STEPS}) == 4


def test_prefetched_shares_are_shares_of_the_batches():
    made, mine = batch_worker.make(), batch_worker.share(1, 2)
    stream = made.prefetched(32, 16, mine, threads=2)
    for step in range(3):
        whole, part = made.batch_at(2 + step, 16), next(stream)
        assert all((ours == array[mine]).all() for ours, array in zip(part, whole, strict=True))
    stream.close()


@pytest.mark.parametrize("whole", [False, True])
def test_step_ten_million_costs_what_step_ten_costs(whole):
    made = build(options=BlankOptions(whole_documents=whole))
    early, late = least_cpu_seconds(lambda step: made.batch_at(step, 8), 10, 10_000_000)
    assert late < 2 * early


@pytest.mark.parametrize("whole", [False, True])
def test_each_document_comes_once_an_epoch_across_a_ramp_of_the_batch_size(whole):
    """The batch grows from 4 rows to 12; rows that an operator skips count as drawn."""
    options = BlankOptions(whole_documents=whole)
    documents = Documents(np.random.default_rng(3).integers(2, 90, 150))
    made = build({"en": documents}, seq_length=64, options=options)
    read = collections.defaultdict(list)
    samples = step = 0
    while made.locate(samples).epoch < 3:
        rows = min(4 + 2 * (step // 9), 12)
        if step % 7 == 5:  # skipped
            for row in range(samples, samples + rows):
                read[made.locate(row).epoch].append(made.text(made.locate(row)))
        else:
            batch = made.at(samples, rows)
            for b in range(rows):
                read[made.locate(samples + b).epoch] += check_row(batch, b, options)
        samples, step = samples + rows, step + 1
    assert step > 30 and min(read) == 0
    for epoch in (0, 1):
        assert (np.sort(np.concatenate(read[epoch])) == np.sort(documents.stream())).all()
