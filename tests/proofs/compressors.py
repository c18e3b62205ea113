"""Compare a run's held-out bits a byte with those of compressors on the same text.

    python tests/proofs/compressors.py --workdir runs/quickstart

takes the text of the held-out rows that the run scores, and prints a table by source with a line for each of

- `model`: the run's last evaluation. It predicts the targets alone, given their contexts, which may stand behind them.
- `xz -9e`: the text by itself (LZMA, preset 9 | EXTREME).
- `xz -9e after training text`: what the text adds to the training text's size.
- `zstd -19 with training text`: with the training text as a dictionary, and a window that holds all of it.

Compressors decode the whole text from their bytes, and the model does not: its number is that of an easier task. This
takes about half a minute and needs the extra `corpora`.
"""

from __future__ import annotations

import argparse
import json
import lzma
import math
import sys
from collections.abc import Mapping
from pathlib import Path

import zstandard

from glm_jax.config import Experiment
from glm_jax.data.corpora.prepare import Prepared, prepare
from glm_jax.data.rows.experiment import heldout_batches
from glm_jax.workdir import folder

PRESET = 9 | lzma.PRESET_EXTREME
LEVEL = 19
WAYS = ("model", "xz -9e", "xz -9e after training text", "zstd -19 with training text")


def scored_text(config: Experiment, prepared: Prepared) -> dict[str, bytes]:
    """Return the text of each source's held-out rows that an evaluation reads, each row once, in order."""
    found = {}
    for name, batches in heldout_batches(config, prepared).items():
        rows = min(config.train.eval_rows, max(batches.rows_per_epoch, 1))
        texts = (prepared.tokenizer.decode(batches.text(batches.locate(row)).tolist()) for row in range(rows))
        found[name] = "".join(texts).encode()
    return found


def training_text(prepared: Prepared, name: str) -> bytes:
    """Return all documents of a source that are trained on, a blank line between two."""
    documents = prepared.shards[name]["train"]
    texts = (prepared.tokenizer.decode(documents[number].tolist()) for number in range(len(documents)))
    return "\n\n".join(texts).encode()


def xz(text: bytes) -> int:
    """Return the bytes that `xz -9e` makes of a text, with a dictionary as large as the text may need."""
    size = max(1 << 26, 1 << (len(text) - 1).bit_length())
    return len(lzma.compress(text, filters=[{"id": lzma.FILTER_LZMA2, "preset": PRESET, "dict_size": size}]))


def zstd(text: bytes, known: bytes) -> int:
    """Return the bytes that `zstd -19` makes of a text, with another as its dictionary."""
    window = max(23, (len(text) + len(known)).bit_length())
    size = len(known) + len(text)  # by which tables are sized, those of the dictionary too
    how = zstandard.ZstdCompressionParameters.from_level(LEVEL, window_log=window, source_size=size)
    dictionary = zstandard.ZstdCompressionDict(known, dict_type=zstandard.DICT_TYPE_RAWCONTENT)
    packed = zstandard.ZstdCompressor(dict_data=dictionary, compression_params=how).compress(text)
    unpacked = zstandard.ZstdDecompressor(dict_data=dictionary, max_window_size=1 << window).decompress(packed)
    assert unpacked == text
    return len(packed)


def last_evaluation(workdir: Path) -> Mapping[str, float]:
    """Return the run's last evaluation."""
    lines = (workdir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [event for event in map(json.loads, lines) if event["event"] == "evaluation"][-1]


def main() -> int:
    """Print the table, and the same as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--workdir", type=Path, required=True, help="of a run with held-out text")
    workdir = parser.parse_args().workdir
    config, evaluation = folder.read_config(workdir), last_evaluation(workdir)
    prepared = prepare(config, lambda line: print(line, file=sys.stderr), tokenizer=folder.read_tokenizer(workdir))
    table: dict[str, dict[str, float]] = {}
    for name, text in scored_text(config, prepared).items():
        known = training_text(prepared, name)
        sizes = xz(text), xz(known + text) - xz(known), zstd(text, known)
        values = [evaluation[f"bits_per_byte/{name}"], *(8 * size / len(text) for size in sizes)]
        table[name] = dict(zip(WAYS, values, strict=True)) | {"bytes": len(text), "training bytes": len(known)}
    print(f"| bits a byte | {' | '.join(table)} |\n|{' --- |' * (len(table) + 1)}")
    for way in WAYS:
        print(f"| {way} | {' | '.join(f'{found[way]:.3f}' for found in table.values())} |")
    print(json.dumps({"step": evaluation["step"], "sources": table}))
    return int(not all(math.isfinite(value) for found in table.values() for value in found.values()))


if __name__ == "__main__":
    sys.exit(main())
