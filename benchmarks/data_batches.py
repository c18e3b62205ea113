"""Measure what blanks cost: [MASK] and [gMASK] batches against batches of the same records without blanks.

    python benchmarks/data_batches.py [--documents 20000] [--rows 32] [--rounds 40] [--seq-length 2048]

Both sides read the same ArrayRecord shards, one record a document, in random order. The raw side joins the documents,
cuts the result into rows and copies them into a batch; the other side is `Batches.at` with GLM-130B's shares and
segments. The sides take turns, and the medians of their CPU times are compared, so that other work on the machine
matters little. The last lines are the ratio, which should be at most 4, and the tokens a second of one core; the goal
is 2 million.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from glm_jax.config.data import BlankOptions
from glm_jax.data.corpora.shards import Shards
from glm_jax.data.rows.batches import Batches

SPECIAL: Any = SimpleNamespace(pad=0, eos=2, mask=3, gmask=4, smask=5, sop=6, eop=7, prefix=())
VOCABULARY = 30_000  # two bytes a token, as in the corpora of the quickstart
SHARES = {"mask": 0.3, "gmask": 0.7}
LIMIT, GOAL = 4.0, 2e6  # ratio, tokens a second of one core


def write_corpus(path: Path, documents: int, seed: int = 0) -> Shards:
    """Write made-up documents, from a few tokens to tens of thousands (log-normal), and open them."""
    generator = np.random.default_rng(seed)
    lengths = np.clip(generator.lognormal(6.2, 1.2, documents), 8, 50_000).astype(np.int64)
    writer = ArrayRecordWriter(str(path), "group_size:1")
    for length in lengths:
        writer.write(np.append(generator.integers(8, VOCABULARY, length - 1), SPECIAL.eos).astype("<u2").tobytes())
    writer.close()
    return Shards([path], lengths, "<u2")


def raw_batches(shards: Shards, rows: int, seq_length: int, seed: int = 0) -> Iterator[np.ndarray]:
    """Yield the documents as they are, in random order, joined and cut into int32 [rows, seq_length]."""
    generator = np.random.default_rng(seed)
    buffer: list[np.ndarray] = []
    held = 0
    while True:
        for index in generator.permutation(len(shards)).tolist():
            buffer.append(shards[index])
            held += len(buffer[-1])
            while held >= rows * seq_length:
                run = np.concatenate(buffer)
                yield run[: rows * seq_length].reshape(rows, seq_length).copy()
                buffer = [run[rows * seq_length :]]
                held = len(buffer[0])


def compare(left: Callable[[int], Any], right: Callable[[int], Any], rounds: int, warm: int = 3) -> tuple[float, float]:
    """Call both with 0, 1, ... in turn; return the medians of their CPU seconds, without the first `warm` calls."""
    times: tuple[list[float], list[float]] = ([], [])
    for turn in range(rounds + warm):
        for side, call in zip(times, (left, right), strict=True):
            start = time.process_time()
            call(turn)
            side.append(time.process_time() - start)
    return statistics.median(times[0][warm:]), statistics.median(times[1][warm:])


def main() -> int:
    """Run the benchmark; return 1 if the ratio is over the limit."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for flag, default in (("documents", 20_000), ("rows", 32), ("rounds", 40), ("seq-length", 2048)):
        parser.add_argument(f"--{flag}", type=int, default=default)
    arguments = parser.parse_args()
    rows, length = arguments.rows, arguments.seq_length
    over = False
    with tempfile.TemporaryDirectory() as directory:
        shards = write_corpus(Path(directory) / "train.array_record", arguments.documents)
        print(f"{len(shards):,} documents, {int(shards.lengths.sum()):,} tokens; batches of {rows} rows of {length}")
        for name, options in (
            ("documents cut", BlankOptions(mask_segments=4)),
            ("whole documents", BlankOptions(whole_documents=True)),
        ):
            made = Batches({"corpus": shards}, {"corpus": 1.0}, SPECIAL, length, SHARES, 0, options=options)
            stream = raw_batches(shards, rows, length)
            raw, built = compare(
                lambda _, stream=stream: next(stream),
                lambda turn, made=made: made.batch_at(turn, rows),
                arguments.rounds,
            )
            rate = rows * length / built
            over |= built > LIMIT * raw
            print(f"{name}: {1e3 * raw:.2f} ms raw, {1e3 * built:.2f} ms with blanks (CPU, medians)")
            print(f"{name}: ratio {built / raw:.2f} (at most {LIMIT:g})")
            print(f"{name}: {rate / 1e6:.2f} M tokens/s a core (goal {GOAL / 1e6:g})")
    return int(over)


if __name__ == "__main__":
    raise SystemExit(main())
