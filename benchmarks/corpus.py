"""Time the search for duplicates in a corpus beside plain hashing of the same bytes.

    python benchmarks/corpus.py [--rounds 7] [--documents 2000] [--words 500]

The documents are English-like words; half are near duplicates of another. The sides: `sha256` hashes the bytes with
hashlib; `exact` takes the digests by which exact duplicates are found; `signatures` makes the shingles and the MinHash
signatures; `near` finds near duplicates by signatures and shingles in memory. The lines are MB a second of one core,
medians with the smallest and the largest round, and for `near` the memory that it takes for each document, signatures
included, shingles not.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import sys
import tracemalloc
from collections.abc import Callable, Sequence

import numpy as np
import rounds
import shared
from rounds import Measured, compare, interval

THRESHOLD = 0.8
PLAIN, EXACT, SIGNATURES, NEAR = "sha256", "exact", "signatures", "near"


def made_up(documents: int, words: int) -> list[str]:
    """Return texts of about `words` words, of which every other one differs from the one before in every fiftieth."""
    random = np.random.default_rng(0)
    letters = np.array(list("abcdefghijklmnopqrstuvwxyz"))
    vocabulary = np.array(["".join(random.choice(letters, random.integers(2, 10))) for _ in range(20_000)])
    texts, chosen = [], np.empty(0, np.int64)
    for number in range(documents):
        if number % 2 == 0:
            chosen = random.integers(0, len(vocabulary), int(random.integers(words // 2, 2 * words)))
        else:
            chosen[::50] = random.integers(0, len(vocabulary), len(chosen[::50]))
        texts.append(" ".join(vocabulary[chosen]))
    return texts


def serve(options: argparse.Namespace) -> None:
    """Be one side."""
    from glm_jax.data.corpora import deduplicate

    texts = made_up(options.documents, options.words)
    encoded = [text.encode() for text in texts]
    size = sum(map(len, encoded))

    def signatures() -> tuple[list[np.ndarray], np.ndarray]:
        hashes = [deduplicate.shingles(text) for text in texts]
        return hashes, np.array([deduplicate.signature(own) for own in hashes], np.uint32)

    ready = signatures() if options.side == NEAR else ([], np.empty(0, np.uint32))

    def near() -> float:
        return float(deduplicate.near_duplicates(ready[1], ready[0], THRESHOLD).mean())

    works: dict[str, Callable[[], object]] = {
        PLAIN: lambda: [hashlib.sha256(data).digest() for data in encoded],
        EXACT: lambda: [deduplicate.digest_of(text) for text in texts],
        SIGNATURES: signatures,
        NEAR: near,
    }
    work = works[options.side]

    def about() -> dict[str, float]:
        if options.side != NEAR:
            return {"bytes": size}
        tracemalloc.start()
        found = near()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return {"bytes": size, "found": found, "memory": (peak + ready[1].nbytes) / len(texts)}

    def turn() -> dict[str, float]:
        work()
        return {}

    rounds.serve(turn, about)


def report(options: argparse.Namespace, measured: dict[str, Measured]) -> None:
    """Print a line for each side."""
    for name, side in measured.items():
        rate = [side.about["bytes"] / 1e6 / seconds for seconds in side.cpu_seconds()]
        documents = [options.documents / seconds for seconds in side.cpu_seconds()]
        print(f"{name}: {interval(rate, 1)} MB/s a core, {interval(documents, 0)} documents/s a core")
        if name != PLAIN:
            print(compare(measured, name, PLAIN))
    about = measured[NEAR].about
    print(f"{NEAR}: {about['memory']:.0f} bytes of memory a document; {about['found']:.0%} of the documents found")


def main(words: Sequence[str]) -> None:
    """Run the benchmark, or one side of it."""
    options = shared.parser(__doc__, {"documents": 2_000, "words": 500}).parse_args(words)
    if options.side:
        return serve(options)
    names = (PLAIN, EXACT, SIGNATURES, NEAR)
    sides = [rounds.script(name, __file__, *words, "--side", name) for name in names]
    return report(options, rounds.measure(sides, options.rounds))


if __name__ == "__main__":
    os.environ["JAX_PLATFORMS"] = "cpu"
    main(sys.argv[1:])
