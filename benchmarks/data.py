"""Time batches with blanks beside plain reading of the same records, and beside the training step that they are for.

    python benchmarks/data.py [--rounds 7] [--documents 20000] [--records 1000] [--rows 32] [--length 2048] ...

The documents are made up, from a few tokens to tens of thousands (log-normal), in ArrayRecord files of `--records`
each, about as many as a part of a corpus has. Their number matters: reading a record takes the library longer the more
records its file has, so that a ratio to plain reading alone can be made as good as one likes. The sides: `read` takes
the documents in random order, joins them and cuts the result into rows; `cut` and `whole` are `Batches` with GLM-130B's
shares, of documents cut anywhere and of whole ones; `step` is train.py's, with a model of the quickstart's size. A turn
makes `--batches` batches. The lines are medians with the smallest and the largest round: tokens a second of one core,
CPU time a token, and the share of the step's CPU time that making its rows is.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import rounds
import shared
from rounds import Measured, Side, compare, interval

SPECIAL: Any = SimpleNamespace(pad=0, eos=2, mask=3, gmask=4, smask=5, sop=6, eop=7, prefix=())
VOCABULARY = 30_000  # two bytes a token, as in the corpora of the quickstart
SHARES = {"mask": 0.3, "gmask": 0.7}
STEP = {"layers": 4, "hidden": 128, "heads": 4, "ffn": 344, "vocabulary": 8192, "rows": 16, "length": 256}  # quickstart
STEP |= {"microbatches": 4}
READ, KINDS, TRAIN = "read", ("cut", "whole"), "step"


def write_corpus(folder: Path, documents: int, records: int) -> None:
    """Write made-up documents in files of `records` each, and their lengths."""
    from array_record.python.array_record_module import ArrayRecordWriter

    random = np.random.default_rng(0)
    lengths = np.clip(random.lognormal(6.2, 1.2, documents), 8, 50_000).astype(np.int64)
    np.save(folder / "lengths.npy", lengths)
    for number, first in enumerate(range(0, documents, records)):
        writer = ArrayRecordWriter(str(folder / f"{number:06}.array_record"), "group_size:1")
        for length in lengths[first : first + records]:
            writer.write(np.append(random.integers(8, VOCABULARY, length - 1), SPECIAL.eos).astype("<u2").tobytes())
        writer.close()


def read_batches(documents: Any, rows: int, length: int) -> Iterator[np.ndarray]:
    """Yield the documents as they are, in random order, joined and cut into int32 [rows, length]."""
    random = np.random.default_rng(0)
    buffer: list[np.ndarray] = []
    held = 0
    while True:
        for index in random.permutation(len(documents)).tolist():
            buffer.append(documents[index])
            held += len(buffer[-1])
            while held >= rows * length:
                run = np.concatenate(buffer)
                yield run[: rows * length].reshape(rows, length).copy()
                buffer = [run[rows * length :]]
                held = len(buffer[0])


def blanked_batches(documents: Any, kind: str, rows: int, length: int) -> Iterator[object]:
    """Yield batches with blanks of documents cut or whole."""
    from glm_jax.config.data import BlankOptions
    from glm_jax.data.rows.batches import Batches

    options = BlankOptions(whole_documents=True) if kind == "whole" else BlankOptions(mask_segments=4)
    made = Batches({"corpus": documents}, {"corpus": 1.0}, SPECIAL, length, SHARES, 0, options=options)
    number = 0
    while True:
        yield made.batch_at(number, rows)
        number += 1


def serve(options: argparse.Namespace) -> None:
    """Be one side but the step."""
    from glm_jax.data.corpora.shards import Shards

    paths = sorted(options.folder.glob("*.array_record"))
    documents = Shards(paths, np.load(options.folder / "lengths.npy"), "<u2")
    if options.side == READ:
        batches: Iterator[object] = read_batches(documents, options.rows, options.length)
    else:
        batches = blanked_batches(documents, options.side, options.rows, options.length)

    def turn() -> dict[str, float]:
        for _ in range(options.batches):
            next(batches)
        return {}

    rounds.serve(turn)


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    tokens = options.batches * options.rows * options.length
    trained = [seconds / (STEP["rows"] * STEP["length"]) for seconds in measured[TRAIN].cpu_seconds()]
    print(f"{TRAIN}: {interval([1e9 * seconds for seconds in trained], 0)} CPU ns a token")
    for name in (READ, *KINDS):
        each = [seconds / tokens for seconds in measured[name].cpu_seconds()]
        shares = [100 * made / step for made, step in zip(each, trained, strict=True)]
        print(f"{name}: {interval([1e-6 / seconds for seconds in each])} M tokens/s a core, "
              f"{interval([1e9 * seconds for seconds in each], 0)} CPU ns a token, "
              f"{interval(shares)}% of the step's")  # fmt: skip
    for name in KINDS:
        print(compare(measured, name, READ))


def sides(words: Sequence[str], folder: str) -> list[Side]:
    """Return what takes turns."""
    step = [word for flag, value in STEP.items() for word in (f"--{flag}", str(value))]
    held = [rounds.script(name, __file__, *words, "--folder", folder, "--side", name) for name in (READ, *KINDS)]
    return [*held, rounds.script(TRAIN, str(Path(__file__).with_name("train.py")), *step, "--side", "ours")]


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    numbers = {"documents": 20_000, "records": 1_000, "rows": 32, "length": 2048, "batches": 10}
    options = shared.parser(__doc__, numbers).parse_args(words)
    if options.side:
        return serve(options)
    with tempfile.TemporaryDirectory() as folder:
        write_corpus(Path(folder), options.documents, options.records)
        report(options, rounds.measure(sides(words, folder), options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
