"""The benchmark of batches measures what it claims to."""

import importlib.util
import itertools
from pathlib import Path

import numpy as np
import pytest

import glm_jax


@pytest.fixture(scope="module")
def benchmark():
    path = Path(glm_jax.__file__).parents[1] / "benchmarks" / "data_batches.py"
    spec = importlib.util.spec_from_file_location("data_batches", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_the_raw_side_reads_each_document_once_an_epoch(benchmark, tmp_path):
    shards = benchmark.write_corpus(tmp_path / "train.array_record", 60)
    tokens = int(shards.lengths.sum())
    batches = -(-tokens // (4 * 64))
    raw = list(itertools.islice(benchmark.raw_batches(shards, 4, 64), 2 * batches))
    assert all(batch.shape == (4, 64) and batch.dtype == np.int32 for batch in raw)
    run = np.concatenate(raw).reshape(-1)
    stream = np.concatenate([shards[i] for i in range(60)])
    for epoch in (run[:tokens], run[tokens : 2 * tokens]):
        assert (np.sort(epoch) == np.sort(stream)).all() and not (epoch == stream).all()


def test_sides_take_turns_and_medians_leave_the_first_calls_out(benchmark, monkeypatch):
    calls, clock = [], [0.0]

    def side(name, costs):
        def call(turn):
            calls.append((name, turn))
            clock[0] += costs[turn]

        return call

    monkeypatch.setattr(benchmark.time, "process_time", lambda: clock[0])
    medians = benchmark.compare(side("a", [90, 1, 2, 9]), side("b", [90, 5, 4, 5]), rounds=3, warm=1)
    assert medians == (2, 5)
    assert calls == [(name, turn) for turn in range(4) for name in "ab"]


def test_blanks_cost_a_few_times_what_raw_records_cost(benchmark, monkeypatch, capsys):
    """The limit is 4 on a quiet machine. This guards against a mistake that makes rows many times slower."""
    monkeypatch.setattr(benchmark, "LIMIT", 10.0)
    monkeypatch.setattr("sys.argv", ["data_batches.py", "--documents=1000", "--rows=16", "--rounds=8"])
    assert benchmark.main() == 0
    assert capsys.readouterr().out.count("M tokens/s a core") == 2
    monkeypatch.setattr(benchmark, "LIMIT", 0.1)
    assert benchmark.main() == 1
