"""Show what a corpus holds: counts, lengths, and rows with their blanks filled in and coloured."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.corpora.corpus import skipped_lines
from glm_jax.data.corpora.prepare import Prepared
from glm_jax.data.rows.rows import Rows
from glm_jax.data.tokenizers.protocol import Tokenizer

BAR = 40  # characters of the longest bar
COLOURS = [f"\x1b[{code}m" for code in (31, 32, 33, 34, 35, 36)]  # of blanks, in turn
PLAIN = "\x1b[0m"
END_OF_DOCUMENT = " <eos> "


def counts(prepared: Prepared) -> Iterator[str]:
    """Yield lines that give what each source and set of instructions holds, what was left out, and its lengths."""
    for source, index in prepared.indexes.items():
        dropped = index["dropped"]
        yield f"{source} ({prepared.languages[source]}, weight {prepared.weights[source]:g})"
        for split, documents in index["documents"].items():
            tokens, size = index["tokens"][split], index["bytes"][split]
            ratio = f", {size / tokens:.2f} bytes a token" if tokens else ""
            yield f"  {split:8} {documents:,} documents, {tokens:,} tokens, {size:,} bytes{ratio}"
        yield f"  dropped  {dropped['exact']:,} exact and {dropped['near']:,} near duplicates"
        yield from (f"  skipped  {line}" for line in skipped_lines(index))
        yield "  tokens a document"
        yield from (f"  {line}" for line in histogram(prepared.shards[source]["train"].lengths))
    for name, sides in prepared.instructions.items():
        index = sides.train.index
        weight = prepared.instruction_weights.get(name)
        yield f"{name} (instructions, {'scored alone' if weight is None else f'weight {weight:g}'})"
        for split, instructions in (("train", sides.train), ("heldout", sides.heldout)):
            yield f"  {split:8} {len(instructions):,} samples, {int(instructions.lengths.sum()):,} tokens"
        if sides.cut or sides.left_out:
            yield f"  too long {sides.cut:,} prompts cut at their beginning, {sides.left_out:,} samples left out"
        if unasked := index["unasked"]:
            yield f"  unasked  {unasked:,} with nothing to ask"
        yield from (f"  skipped  {line}" for line in skipped_lines(index))
        yield "  tokens a sample"
        yield from (f"  {line}" for line in histogram(sides.train.lengths))


def histogram(lengths: np.ndarray) -> list[str]:
    """Return the lines of a bar chart that counts `lengths` between successive powers of two."""
    exponents = np.log2(np.maximum(lengths, 1)).astype(int)  # [documents]
    bins = np.bincount(exponents)
    lines = []
    for exponent in range(exponents.min(), exponents.max() + 1):
        span = f"{1 << exponent:,} to {(2 << exponent) - 1:,}"
        bar = "#" * -(-BAR * int(bins[exponent]) // int(bins.max()))
        lines.append(f"{span:>24}  {int(bins[exponent]):>10,}  {bar}".rstrip())
    return lines


def rows(batch: Rows[np.ndarray], sources: tuple[str, ...], tokenizer: Tokenizer, *, coloured: bool) -> Iterator[str]:
    """Yield each row of a batch as text, with "[MASK: what was there]" in place of each blank.

    Args:
        batch: as rows.batches.Batches.at returns it.
        sources: the names that `batch.source` indexes.
        coloured: give each blank a colour, for a terminal.
    """
    for b in range(len(batch.tokens)):
        yield f"row {b}: {sources[batch.source[b]]}, {OBJECTIVES[batch.objective[b]]}"
        for segment in range(1, batch.segments[b].max() + 1):
            yield _sample(batch, b, batch.segments[b] == segment, tokenizer, coloured)


def _sample(batch: Rows[np.ndarray], b: int, here: np.ndarray, tokenizer: Tokenizer, coloured: bool) -> str:
    """Return the text of the sample in row b where `here`, bool [S], is True."""
    tokens, targets, context = batch.tokens[b, here], batch.targets[b, here], batch.context[b, here]  # [s] each
    positions = np.atleast_2d(batch.positions[b])[0, here]  # [s]
    blanks = {tokenizer.gmask: "gMASK", tokenizer.smask: "sMASK", tokenizer.mask: "MASK"}  # which may be one token
    starts = np.flatnonzero(~context & (tokens == tokenizer.sop))
    spans = dict(zip(positions[starts].tolist(), np.split(targets, starts)[1:], strict=True))
    places = [place for place in np.flatnonzero(context) if tokens[place] in blanks]
    parts: list[str] = []
    run: list[int] = []
    for place in np.flatnonzero(context):
        token = int(tokens[place])
        if token not in blanks and token != tokenizer.eos:
            run.append(token)
            continue
        parts.append(tokenizer.decode(run))
        run = []
        if token == tokenizer.eos:
            parts.append(END_OF_DOCUMENT)
            continue
        span = spans.get(int(positions[place])) if len(places) > 1 else next(iter(spans.values()), None)
        filled = "" if span is None else f": {_target(span, tokenizer)}"
        blank = f"[{blanks[token]}{filled}]"
        parts.append(f"{COLOURS[places.index(place) % len(COLOURS)]}{blank}{PLAIN}" if coloured else blank)
    return "".join([*parts, tokenizer.decode(run)])


def _target(span: np.ndarray, tokenizer: Tokenizer) -> str:
    """Return the text of one target, with ends of documents shown."""
    ends = np.flatnonzero(span == tokenizer.eos)
    return END_OF_DOCUMENT.join(tokenizer.decode(part) for part in np.split(span, ends))
