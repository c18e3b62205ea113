"""Rows and batches as a pure function of their number: `at(first_row, rows)` needs no iterator state.

How row k is found, each step in closed form:

1. The mixture says which source and objective it has, and the how-manieth of that pair it is.
2. A source is one stream: its documents one after another. An epoch cuts it into blocks of a few rows' text,
   from a new starting point and in a new order. Objectives take blocks by turns, as their rows come up; a
   block is cut into rows by the one that took it, because a [MASK] row holds less text than a [gMASK] row.
   `OPEN` blocks are read side by side, so that neighbouring rows do not come from the same page.
3. The row's text becomes samples with blanks, drawn by a generator keyed by (seed, row).

So each token of a source is read exactly once an epoch of that source, whatever the batch size, however the
weights move and however many processes share the work; and a later change of the weights leaves earlier rows
as they were.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol

import grain
import numpy as np

from glm_jax.data.blanks import OBJECTIVES, BlankOptions, SpecialTokens, make_samples, text_length
from glm_jax.data.mixture import History, Mixture
from glm_jax.errors import UserError

BLOCK_ROWS = range(6, 17)  # rows of the longest text in a block; the count that wastes least is taken
OPEN = 16  # blocks that an objective reads side by side
CACHED = 4 * OPEN  # documents kept at hand: a long one is read by many rows, one from each open block's text
SMALLEST_STREAM = 16  # tokens; less is no source
LAST_ROW = 1 << 48  # far beyond any run


class Documents(Protocol):
    """A source: documents in a fixed, shuffled order, each ending in eos.

    Attributes:
        lengths: int64 [documents], tokens of each, eos included.
    """

    lengths: np.ndarray

    def __len__(self) -> int: ...

    def __getitem__(self, index: int, /) -> np.ndarray: ...


@dataclass(frozen=True)
class Row:
    """Where row `number` comes from.

    Attributes:
        number: the row, counted from the start of training.
        source: index of the source.
        objective: name of the objective.
        epoch: epoch of the source that the text belongs to.
        start, stop: the text's place in the epoch's stream, in tokens from where the epoch begins.
    """

    number: int
    source: int
    objective: str
    epoch: int
    start: int
    stop: int


class Stream:
    """A source as one run of tokens, and how an epoch of it is cut into blocks.

    Attributes:
        tokens: length of the stream.
        blocks: blocks of an epoch.
        together: blocks that an objective opens at a time.
        rows: by objective, the rows that a block makes.
    """

    def __init__(self, name: str, documents: Documents, takes: Mapping[str, int], seed: int) -> None:
        """Plan the cuts.

        Args:
            name: the source's name; with `seed` it keys the order of the blocks.
            documents: the text.
            takes: by objective, the text tokens that a row holds.
            seed: of the run.

        Raises:
            UserError: there is next to no text.
        """
        self._document = functools.lru_cache(CACHED)(documents.__getitem__)
        self._offsets = np.concatenate([[0], np.cumsum(documents.lengths, dtype=np.int64)])
        self._epoch = functools.lru_cache(1024)(self._find_epoch)
        self._key = (seed, zlib.crc32(name.encode("utf-8")))
        self.tokens = int(self._offsets[-1])
        if self.tokens < SMALLEST_STREAM:
            raise UserError(f"source {name} holds {self.tokens} tokens, not even {SMALLEST_STREAM}: add text")
        longest = max(takes.values())
        best = min(BLOCK_ROWS, key=lambda rows: max(_waste(rows * longest, take) for take in takes.values()))
        block = longest * min(best, max(1, self.tokens // (16 * longest)))
        self.blocks = -(-self.tokens // block)
        self.together = min(OPEN, max(1, self.blocks // OPEN))
        longest_block = -(-self.tokens // self.blocks)
        self.rows = {objective: -(-longest_block // take) for objective, take in takes.items()}

    def _find_epoch(self, epoch: int) -> tuple[int, int]:
        """Give (key of the block order, rotation: the token at which the epoch's stream begins)."""
        order, rotation = np.random.SeedSequence((*self._key, epoch)).generate_state(2, np.uint64)
        return int(order), int(rotation) % self.tokens

    def locate(self, turn: int, objective: str, row: int, window: int | None = None) -> tuple[int, int, int]:
        """Give (epoch, start, stop) of a row's text.

        Args:
            turn: how many times blocks of this stream were opened before, by any objective.
            objective: the one that opened them.
            row: which of the `together * rows[objective]` rows that these blocks make.
            window: take this one of the epoch's windows instead of the next in order.
        """
        part, lane = divmod(row, self.together)
        epoch, place = divmod(turn * self.together + lane, self.blocks)
        order, _ = self._epoch(epoch)
        parts = self.rows[objective]
        if window is None:
            block = shuffled(place, self.blocks, order)
        else:
            block, part = divmod(window % (self.blocks * parts), parts)
        first, last = (b * self.tokens // self.blocks for b in (block, block + 1))
        return epoch, first + part * (last - first) // parts, first + (part + 1) * (last - first) // parts

    def read(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Read tokens [start, stop) of an epoch's stream, from its rotation on: int32 [stop - start]."""
        _, rotation = self._epoch(epoch)
        start, stop = start + rotation, stop + rotation
        if start >= self.tokens:
            start, stop = start - self.tokens, stop - self.tokens
        pieces = self._pieces(start, min(stop, self.tokens))
        if stop > self.tokens:
            pieces += self._pieces(0, stop - self.tokens)
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)

    def _pieces(self, start: int, stop: int) -> list[np.ndarray]:
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        last = int(np.searchsorted(self._offsets, stop, side="left"))
        pieces = []
        for index in range(first, last):
            begin = int(self._offsets[index])
            pieces.append(np.asarray(self._document(index)[max(start - begin, 0) : stop - begin], np.int32))
        return pieces


def shuffled(index: int, size: int, key: int) -> int:
    """Give the place of `index` in the permutation of 0..size-1 that `key` picks, in constant time.

    A Feistel network over two digits in base sqrt(size); what falls outside 0..size-1 goes through again.
    """
    base = math.isqrt(max(size, 1) - 1) + 1
    while True:
        high, low = divmod(index, base)
        for turn in range(8):
            mixed = (low + turn * 0x9E3779B97F4A7C15 ^ key) * 0xBF58476D1CE4E5B9 & 0xFFFFFFFFFFFFFFFF
            mixed = (mixed ^ mixed >> 31) * 0x94D049BB133111EB & 0xFFFFFFFFFFFFFFFF
            high, low = low, (high + (mixed >> 32)) % base
        index = high * base + low
        if index < size:
            return index


def _waste(block: int, take: int) -> float:
    """Give the share of empty room when rows of `take` tokens share a block evenly."""
    return 1 - block / (take * -(-block // take))


class Batches:
    """Batches of training or evaluation rows.

    Attributes:
        sources: names, in the order that a batch's `source` counts.
        rows_per_epoch: rows from row 0 on that surely hold no text twice: what one pass over a held-out set
            can use.
    """

    def __init__(
        self, sources: Mapping[str, Documents], weights: History, special: SpecialTokens, seq_length: int,
        objectives: History, seed: int, *, options: BlankOptions | None = None,
        sentence_ends: np.ndarray | None = None, replacement: bool = False,
    ) -> None:  # fmt: skip
        """Plan everything; no text is read yet.

        Args:
            sources: documents by name.
            weights: shares of rows by source, relative to the others'; may be a history over rows.
            special: ids of the special tokens, such as a Tokenizer.
            seq_length: tokens of a row, S.
            objectives: shares of rows by objective (see OBJECTIVES); may be a history over rows. The cuts
                depend on which are named: name one that may come later from the start, with weight 0.
            seed: of the run; another seed gives other orders and other blanks.
            options: how blanks are drawn.
            sentence_ends: bool [V], which tokens end a sentence; the smask objective needs it.
            replacement: draw each row's window at random, as GLM-130B's code did, so that an epoch misses
                some text and repeats some.

        Raises:
            UserError: a weight for an unknown name, no weights, a source without text, or rows too short.
        """
        _check_names(weights, sources, "source")
        _check_names(objectives, OBJECTIVES, "objective")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed is {seed}, it must be from 0 to 2**64 - 1")
        self.sources = tuple(sources)
        self._options = options or BlankOptions()
        self._special, self._seq_length, self._seed = special, seq_length, seed
        self._sentence_ends, self._replacement = sentence_ends, replacement
        named = _names(objectives)
        used = [kind for kind in OBJECTIVES if kind in named]
        if named.get("smask", 0) > 0 and sentence_ends is None:
            raise UserError("smask needs to know which tokens end a sentence: give sentence_ends")
        self._room = {kind: seq_length // self._options.segments(kind) for kind in used}
        takes = {
            kind: self._options.segments(kind) * text_length(kind, room, self._options)
            for kind, room in self._room.items()
        }
        self._streams = [Stream(name, documents, takes, seed) for name, documents in sources.items()]
        self._labels = [(index, kind) for index in range(len(self.sources)) for kind in used]
        self._mixture = Mixture([(self.sources[i], kind) for i, kind in self._labels], weights, objectives)
        self._turn = functools.lru_cache(1 << 14)(self._find_turn)
        self.rows_per_epoch = self._rows_per_epoch()

    def _group(self, label: int) -> int:
        """Give the number of rows that blocks opened together make."""
        source, kind = self._labels[label]
        return self._streams[source].together * self._streams[source].rows[kind]

    def _opened(self, source: int, row: int) -> int:
        """Give how many times blocks of a source were opened before `row`."""
        counts = self._mixture.counts(row)
        mine = [i for i, label in enumerate(self._labels) if label[0] == source]
        return sum(-(-counts[i] // self._group(i)) for i in mine)

    def _find_turn(self, label: int, group: int) -> int:
        return self._opened(self._labels[label][0], self._mixture.row_of(label, group * self._group(label)))

    def _rows_per_epoch(self) -> int:
        """Give the first row at which a source opens blocks of its second epoch, by bisection."""
        low, high = 0, LAST_ROW
        while high - low > 1:
            middle = (low + high) // 2
            if any(self._opened(i, middle) * s.together > s.blocks for i, s in enumerate(self._streams)):
                high = middle
            else:
                low = middle
        return low

    def locate(self, row: int) -> Row:
        """Say where the text of a row comes from."""
        if not 0 <= row < LAST_ROW:
            raise ValueError(f"row {row} is not in 0..{LAST_ROW - 1}")
        label, ordinal = self._mixture.draw(row)
        source, kind = self._labels[label]
        group, place = divmod(ordinal, self._group(label))
        window = int(self._generator(row, 1).integers(1 << 62)) if self._replacement else None
        epoch, start, stop = self._streams[source].locate(self._turn(label, group), kind, place, window)
        return Row(row, source, kind, epoch, start, stop)

    def text(self, row: Row) -> np.ndarray:
        """Read the text of a row: int32 [stop - start]."""
        return self._streams[row.source].read(row.epoch, row.start, row.stop)

    def _generator(self, row: int, purpose: int = 0) -> np.random.Generator:
        key = np.array([self._seed, row + purpose * LAST_ROW], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def at(self, first_row: int, rows: int) -> dict[str, np.ndarray]:
        """Give rows first_row, ..., first_row + rows - 1 as one batch.

        Returns:
            B = rows, S = seq_length. `tokens`, `targets` int32 [B, S] (targets[b, i] is to be predicted at
            token i), `positions` int32 [B, S] or [B, 2, S] with two streams, `segments` int32 [B, S] (1, 2,
            ... the samples of a row, 0 padding), `context` bool [B, S], `loss_mask` float32 [B, S],
            `objective` int32 [B] (index into OBJECTIVES), `source` int32 [B] (index into `sources`). Query i
            may see key j where their segments are equal and j <= i or context[j].
        """
        length = self._seq_length
        pad = self._special.pad
        streams = 2 if self._options.two_streams else 1
        batch = {
            "tokens": np.full((rows, length), pad, np.int32),  # [B, S]
            "targets": np.full((rows, length), pad, np.int32),  # [B, S]
            "positions": np.zeros((rows, streams, length), np.int32),  # [B, 1 or 2, S]
            "segments": np.zeros((rows, length), np.int32),  # [B, S]
            "context": np.zeros((rows, length), bool),  # [B, S]
            "loss_mask": np.zeros((rows, length), np.float32),  # [B, S]
            "objective": np.zeros(rows, np.int32),  # [B]
            "source": np.zeros(rows, np.int32),  # [B]
        }
        for b in range(rows):
            self._fill(batch, b, self.locate(first_row + b))
        if streams == 1:
            batch["positions"] = batch["positions"][:, 0]
        return batch

    def _fill(self, batch: dict[str, np.ndarray], b: int, row: Row) -> None:
        """Write one row into row `b` of a batch."""
        batch["objective"][b] = OBJECTIVES.index(row.objective)
        batch["source"][b] = row.source
        text = self.text(row)
        generator = self._generator(row.number)
        segments = self._options.segments(row.objective)
        place = segment = 0
        for part in range(segments):
            piece = text[part * len(text) // segments : (part + 1) * len(text) // segments]
            if len(piece) == 0:
                continue
            for sample in make_samples(
                row.objective, piece, generator, self._special, self._options, self._room[row.objective],
                self._sentence_ends,
            ):  # fmt: skip
                segment += 1
                stop, divide = place + len(sample), place + sample.context
                batch["tokens"][b, place:stop] = sample.tokens
                batch["targets"][b, place:stop] = sample.targets
                batch["positions"][b, 0, place:stop] = sample.positions
                if self._options.two_streams:
                    batch["positions"][b, 1, place:stop] = sample.block_positions
                batch["segments"][b, place:stop] = segment
                batch["context"][b, place:divide] = True
                batch["loss_mask"][b, divide:stop] = 1
                place = stop

    def batch_at(self, step: int, global_batch: int) -> dict[str, np.ndarray]:
        """Give the batch of `step`, counted from 0, when every step takes `global_batch` rows; see `at`."""
        return self.at(step * global_batch, global_batch)

    def prefetched(
        self, first_row: int, rows: int, *, threads: int = 2, ahead: int = 8
    ) -> grain.DatasetIterator[dict[str, np.ndarray]]:
        """Give `at(first_row, rows)`, `at(first_row + rows, rows)`, ... without end, made ahead by threads.

        The iterator's `close` ends the threads.

        Args:
            first_row, rows: as in `at`.
            threads: that make batches; 0 makes each when it is asked for.
            ahead: batches to hold ready.
        """
        starts = grain.MapDataset.range(first_row, LAST_ROW - rows, rows)
        batches = starts.map(lambda start: self.at(int(start), rows))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(batches.to_iter_dataset(options))


def _names(history: History) -> dict[str, float]:
    """Give every name that a history mentions, with its largest weight."""
    largest: dict[str, float] = {}
    for weights in [history] if isinstance(history, Mapping) else [weights for _, weights in history]:
        for name, weight in weights.items():
            largest[name] = max(weight, largest.get(name, weight))
    return largest


def _check_names(history: History, known: Mapping[str, Documents] | tuple[str, ...], kind: str) -> None:
    for name in sorted(_names(history)):
        if name not in known:
            raise UserError(f"{kind} {name} has a weight but is not there; known: {', '.join(known)}")
