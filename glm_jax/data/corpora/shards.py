"""Shards: the token ids of a documents stage, in ArrayRecord files, written once and read lazily.

shards      part-00000-of-0000N/{train,heldout}.array_record, {train,heldout}-lengths.npy; index.json
"""

from __future__ import annotations

import errno
import itertools
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from array_record.python.array_record_module import ArrayRecordWriter

from glm_jax.data.corpora.build import Workers
from glm_jax.data.corpora.corpus import SPLITS, part_documents, part_folders, read_index, save_array, write_index
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.storage.files import atomic_directory

SHORTEST_TEXT = 16  # tokens; a source with fewer held-out ones is not evaluated


@dataclass(frozen=True)
class _ShardJob:
    documents: Path
    tokenizer: Tokenizer
    dtype: str
    directory: Path


def write_shards(directory: Path, documents: Path, tokenizer: Tokenizer, source: str, workers: Workers) -> None:
    """Tokenise a documents stage into a `directory` that may already hold parts.

    A record is one document's ids, then eos. The index adds to the documents' index: `tokens` by split (including eos),
    `source`, `tokenizer` (its digest) and `dtype` of the records (little-endian).

    Args:
        documents: a directory that `write_documents` filled.
        source: the source's name, for the index.
    """
    parts = part_folders(documents)
    dtype = "<u2" if tokenizer.size <= 1 << 16 else "<u4"
    jobs = [_ShardJob(part, tokenizer, dtype, directory / part.name) for part in parts]
    sizes = [(part / "documents.jsonl").stat().st_size for part in parts]
    tokens = workers.run(f"tokenise {source}", _write_shard, jobs, sizes)
    index = read_index(documents)
    index |= {"tokens": dict(zip(SPLITS, map(sum, zip(*tokens, strict=True)), strict=True))}
    index |= {"source": source, "tokenizer": tokenizer.digest, "dtype": dtype}
    write_index(directory, index)


def _write_shard(job: _ShardJob) -> tuple[int, ...]:
    """Tokenise one part and return its number of tokens by split."""
    if not job.directory.is_dir():
        with atomic_directory(job.directory) as temporary:
            for name in SPLITS:
                lengths = _write_records(temporary / f"{name}.array_record", name, job)
                save_array(temporary / f"{name}-lengths.npy", np.array(lengths, np.int64))
    return tuple(int(np.load(job.directory / f"{name}-lengths.npy").sum()) for name in SPLITS)


def _write_records(path: Path, split_name: str, job: _ShardJob) -> list[int]:
    """Write one split of a part, unless it is empty, and return the lengths."""
    texts = part_documents(job.documents, split_name)
    first = next(texts, None)
    if first is None:
        return []
    lengths = []
    try:
        # One record per group, so that a document is read without its neighbours.
        writer = ArrayRecordWriter(str(path), "group_size:1")
        for text in itertools.chain([first], texts):
            ids = np.append(job.tokenizer.encode(text), job.tokenizer.eos)  # [S]
            writer.write(ids.astype(job.dtype).tobytes())
            lengths.append(len(ids))
        writer.close()
    except RuntimeError as error:  # which has the system's words in its message and no errno
        code = next((code for code in (errno.ENOSPC, errno.EDQUOT) if os.strerror(code) in str(error)), None)
        if code is None:
            raise
        raise OSError(code, os.strerror(code), str(path)) from None
    return lengths


class Shards:
    """The tokenised documents of one split, read lazily. `shards[i]` is int32 [S], ending in eos. Picklable.

    Attributes:
        lengths: int64 [documents], the tokens of each, including eos.
    """

    def __init__(self, paths: list[Path], lengths: np.ndarray, dtype: str):
        from grain.sources import ArrayRecordDataSource  # takes a second, which build workers need not wait

        self.lengths = lengths
        self._dtype = np.dtype(dtype)
        self._records = ArrayRecordDataSource([str(path) for path in paths]) if paths else None

    @classmethod
    def open(cls, directory: Path, split_name: str) -> Shards:
        """Open the split "train" or "heldout" of a directory that `write_shards` filled; it may be empty."""
        parts = part_folders(directory)
        lengths = [np.load(part / f"{split_name}-lengths.npy") for part in parts]
        paths = [path for part in parts if (path := part / f"{split_name}.array_record").exists()]
        return cls(paths, np.concatenate(lengths), read_index(directory)["dtype"])

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> np.ndarray:
        if self._records is None or not 0 <= index < len(self):
            raise IndexError(f"document {index} of {len(self)}")
        return np.frombuffer(self._records[index], self._dtype).astype(np.int32)  # [S]
