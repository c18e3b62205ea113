"""Rows and batches as a pure function of their number: `at(first_row, rows)` needs no iterator state.

How row k is found, each step in closed form:

1. The mixture gives its source and objective, and its ordinal among the rows of that pair.
2. The source gives its text: a window of one long stream (streams.py), or a group of whole documents or instruction
   samples (packing.py), in the epoch's order.
3. The text becomes samples with blanks, drawn by a generator keyed by (seed, row).

So each token of a source is read exactly once in an epoch of that source, whatever the batch size, however the weights
change and however many processes share the work. A later change of the weights leaves earlier rows unchanged.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import grain
import numpy as np

from glm_jax.config.data import OBJECTIVES, BlankOptions
from glm_jax.data.rows import packing
from glm_jax.data.rows.blanks import Sample, make_samples, with_prefix
from glm_jax.data.rows.mixture import History, Mixture
from glm_jax.data.rows.packing import Packing
from glm_jax.data.rows.room import SpecialTokens, places, text_length
from glm_jax.data.rows.rows import Rows
from glm_jax.data.rows.streams import Documents, Stream
from glm_jax.errors import UserError

LAST_ROW = 1 << 48  # far beyond any run


@dataclass(frozen=True)
class Row:
    """Where row `number` comes from.

    Attributes:
        number: the row, counted from the start of training.
        source: index of the source.
        objective: name of the objective.
        epoch: the source's epoch that the text belongs to.
        start, stop: where the text is, in tokens of the epoch's stream from where the epoch begins; with whole
            documents, in pieces of the packing.
    """

    number: int
    source: int
    objective: str
    epoch: int
    start: int
    stop: int


class Batches:
    """Batches of training or evaluation rows.

    Attributes:
        sources: names, in the order that a batch's `source` indexes; without those of text if rows are prompts alone.
        rows_per_epoch: how many rows from row 0 on surely repeat no text: what one pass over a held-out set can use.
    """

    def __init__(
        self, sources: Mapping[str, Documents], weights: History, special: SpecialTokens, seq_length: int,
        objectives: History, seed: int, *, options: BlankOptions | None = None,
        sentence_ends: np.ndarray | None = None, instructions: Mapping[str, Documents] | None = None,
    ) -> None:  # fmt: skip
        """Plan everything; no text is read yet.

        Args:
            sources: documents by name.
            weights: relative shares of an objective's rows by source; may be a history over rows.
            special: ids of the special tokens, such as a Tokenizer.
            seq_length: tokens of a row, S.
            objectives: shares of rows by objective (see OBJECTIVES); may be a history over rows. The cuts
                depend on which objectives are named: name one that may be added later from the start, with weight 0.
            seed: of the run. Another seed gives other orders and other blanks.
            options: how to cut rows and draw blanks.
            sentence_ends: bool [V], which tokens end a sentence; needed by the smask objective.
            instructions: documents that are prompts with answers, by name, for the `instruction` objective; see
                prompts.py. Their weights are among `weights`.

        Raises:
            UserError: a weight names nothing known, there are no weights, a source has no text, or rows are too short.
        """
        prompted = instructions or {}
        self.sources = (*sources, *prompted)
        named = _names(objectives)
        _check_names(weights, self.sources, "source")
        _check_names(objectives, OBJECTIVES, "objective")
        if len(set(self.sources)) < len(self.sources):
            raise UserError("a source of text and one of instructions have the same name: rename one")
        if not 0 <= seed < 1 << 64:
            raise UserError(f"seed is {seed}, it must be from 0 to 2**64 - 1")
        if named.get("smask", 0) > 0 and sentence_ends is None:
            raise UserError("smask needs to know which tokens end a sentence: give sentence_ends")
        if named.get("instruction", 0) > 0 and not prompted:
            raise UserError("instruction has a share of the rows but no source: add data.instructions or set it to 0")
        self._options = options or BlankOptions()
        self._special, self._seq_length, self._seed = special, seq_length, seed
        self._sentence_ends = sentence_ends
        self._blanked = [kind for kind in OBJECTIVES if kind in named and kind != "instruction"]
        if not self._blanked:  # no row is ever made of these
            sources, self.sources = {}, tuple(prompted)
        self._readers = [self._text_reader(name, documents) for name, documents in sources.items()]
        self._readers += [self._instruction_reader(name, documents) for name, documents in prompted.items()]
        self._labels = [(i, kind) for i in range(len(sources)) for kind in self._blanked]
        self._labels += [(i, "instruction") for i in range(len(sources), len(self.sources))]
        self._mixture = Mixture([(self.sources[i], kind) for i, kind in self._labels], weights, objectives)
        self._turn = functools.lru_cache(1 << 14)(self._find_turn)
        self.rows_per_epoch = self._rows_per_epoch()

    def _room(self, kind: str) -> int:
        """Return how many places of a row each of its samples may fill, after the prefix."""
        if kind == "instruction":  # which has it in its documents
            return self._seq_length // self._options.segments(kind)
        parts = 1 if self._options.whole_documents else self._options.segments(kind)
        return self._seq_length // parts - len(self._special.prefix)

    def _text_reader(self, name: str, documents: Documents) -> Stream | Packing:
        takes = {kind: text_length(kind, self._room(kind), self._options) for kind in self._blanked}
        if not self._options.whole_documents or not takes:
            takes = {kind: take * self._options.segments(kind) for kind, take in takes.items()}
            return Stream(name, documents, takes, self._seed)
        longest = min(takes.values())
        pieces = packing.cut_long(documents.lengths, longest)
        reserved = np.max([places(kind, self._seq_length, self._options) for kind in self._blanked], axis=0)
        sizes = np.minimum(reserved[pieces[:, 2] - pieces[:, 1]] + len(self._special.prefix), self._seq_length)
        groups = packing.best_fit(sizes, self._seq_length, self._seed)
        return Packing(name, documents, pieces, groups, self._seed)

    def _instruction_reader(self, name: str, documents: Documents) -> Packing:
        lengths, room = documents.lengths, self._room("instruction")
        if room < 16:
            raise UserError(f"instruction samples have {room} places: raise data.seq_length or lower their segments")
        pieces = np.stack([np.arange(len(lengths)), np.zeros_like(lengths), lengths], axis=1)
        if self._options.whole_documents:
            groups = packing.best_fit(np.minimum(lengths, room), self._seq_length, self._seed)
        else:
            groups = packing.by_number(len(lengths), self._options.instruction_segments, self._seed)
        return Packing(name, documents, pieces, groups, self._seed)

    def _group(self, label: int) -> int:
        """Return how many rows are planned together: those of the blocks that a stream opens at once."""
        source, kind = self._labels[label]
        reader = self._readers[source]
        return 1 if isinstance(reader, Packing) else reader.together * reader.rows[kind]

    def _opened(self, source: int, row: int) -> int:
        """Return how many groups of a source's rows began before `row`."""
        counts = self._mixture.counts(row)
        mine = [i for i, label in enumerate(self._labels) if label[0] == source]
        return sum(-(-counts[i] // self._group(i)) for i in mine)

    def _find_turn(self, label: int, group: int) -> int:
        return self._opened(self._labels[label][0], self._mixture.row_of(label, group * self._group(label)))

    def _second_epoch(self, row: int) -> bool:
        """Whether some source began its second epoch before `row`."""
        for source, reader in enumerate(self._readers):
            groups = reader.rows if isinstance(reader, Packing) else reader.blocks / reader.together
            if self._opened(source, row) > groups:
                return True
        return False

    def _rows_per_epoch(self) -> int:
        low, high = 0, LAST_ROW
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if self._second_epoch(middle) else (middle, high)
        return low

    def locate(self, row: int) -> Row:
        """Return where the text of a row comes from."""
        if not 0 <= row < LAST_ROW:
            raise ValueError(f"row {row} is not in 0..{LAST_ROW - 1}")
        label, ordinal = self._mixture.draw(row)
        source, kind = self._labels[label]
        reader = self._readers[source]
        if isinstance(reader, Packing):
            return Row(row, source, kind, *reader.locate(self._opened(source, row)))
        group, place = divmod(ordinal, self._group(label))
        window = int(self._generator(row, 1).integers(1 << 62)) if self._options.replacement else None
        return Row(row, source, kind, *reader.locate(self._turn(label, group), kind, place, window))

    def text(self, row: Row) -> np.ndarray:
        """Return the text of a row, its documents one after another: int32 [tokens]."""
        reader = self._readers[row.source]
        if isinstance(reader, Packing):
            return np.concatenate(reader.read(row.start, row.stop))
        return reader.read(row.epoch, row.start, row.stop)

    def _generator(self, row: int, purpose: int = 0) -> np.random.Generator:
        key = np.array([self._seed, row + purpose * LAST_ROW], np.uint64)
        return np.random.Generator(np.random.Philox(key=key))

    def _samples(self, row: Row) -> Iterator[Sample]:
        """Yield the samples of a row, in order."""
        kind, options = row.objective, self._options
        reader, generator = self._readers[row.source], self._generator(row.number)
        spare = 0  # places that whole documents did not reserve or did not use
        if isinstance(reader, Packing):
            pieces = reader.read(row.start, row.stop)
            rooms = [self._room(kind)] * len(pieces)
            if kind != "instruction":
                rooms = places(kind, self._seq_length, options)[[len(piece) for piece in pieces]].tolist()
                spare = self._seq_length - sum(rooms) - len(pieces) * len(self._special.prefix)
        else:
            text, parts = reader.read(row.epoch, row.start, row.stop), options.segments(kind)
            edges = [part * len(text) // parts for part in range(parts + 1)]
            pieces = [text[start:stop] for start, stop in zip(edges, edges[1:], strict=False) if start < stop]
            rooms = [self._room(kind)] * len(pieces)
        for piece, room in zip(pieces, rooms, strict=True):
            samples = make_samples(kind, piece, generator, self._special, options, room + spare, self._sentence_ends)
            if options.whole_documents and kind != "instruction":
                spare += room - sum(map(len, samples))
            if kind != "instruction":  # whose documents begin in the prefix
                samples[0] = with_prefix(samples[0], self._special.prefix)
            yield from samples

    def at(self, first_row: int, rows: int, only: Sequence[int] | np.ndarray | None = None) -> Rows[np.ndarray]:
        """Return rows first_row, ..., first_row + rows - 1 as one batch, or a process's share of them.

        Args:
            first_row, rows: of the batch.
            only: the places in the batch, from 0 to rows - 1, of the rows to make, in order; None makes all.

        Returns:
            A batch with B = rows, or the length of `only`, and S = seq_length.
        """
        chosen = range(rows) if only is None else [int(place) for place in only]
        batch = Rows.empty(len(chosen), self._seq_length, self._special.pad, two_streams=self._options.two_streams)
        for b, place in enumerate(chosen):
            row = self.locate(first_row + place)
            batch.fill(b, self._samples(row), row.objective, row.source)
        return batch.causal() if self._options.causal_context else batch

    def batch_at(
        self, step: int, global_batch: int, only: Sequence[int] | np.ndarray | None = None
    ) -> Rows[np.ndarray]:
        """Return the batch of `step`, counted from 0, if every step takes `global_batch` rows; see `at`."""
        return self.at(step * global_batch, global_batch, only)

    def prefetched(
        self, first_row: int, rows: int, only: Sequence[int] | np.ndarray | None = None, *, threads: int = 2,
        ahead: int = 8,
    ) -> grain.DatasetIterator[Rows[np.ndarray]]:  # fmt: skip
        """Return an iterator over `at(first_row, rows, only)`, `at(first_row + rows, rows, only)`, ..., made ahead.

        Its `close` ends the threads.

        Args:
            first_row, rows, only: as in `at`.
            threads: how many make batches; 0 makes each batch on demand.
            ahead: batches to keep ready.
        """
        starts = grain.MapDataset.range(first_row, LAST_ROW - rows, rows)
        batches = starts.map(lambda start: self.at(int(start), rows, only))
        options = grain.ReadOptions(num_threads=threads, prefetch_buffer_size=ahead)
        return iter(batches.to_iter_dataset(options))


def _names(history: History) -> dict[str, float]:
    """Return every name that a history mentions, with its largest weight."""
    largest: dict[str, float] = {}
    for weights in [history] if isinstance(history, Mapping) else [weights for _, weights in history]:
        for name, weight in weights.items():
            largest[name] = max(weight, largest.get(name, weight))
    return largest


def _check_names(history: History, known: tuple[str, ...], kind: str) -> None:
    for name in sorted(_names(history)):
        if name not in known:
            raise UserError(f"{kind} {name} has a weight but does not exist; known: {', '.join(known)}")
