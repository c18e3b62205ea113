"""What a data file of texts asks of a model: how likely each text is, in windows."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from glm_jax.data.tokenizers.protocol import Tokenizer
from glm_jax.errors import UserError
from glm_jax.evaluation import measures, records, rows, score
from glm_jax.evaluation.records import Document
from glm_jax.evaluation.task_files import Task
from glm_jax.evaluation.work import Batches, Columns, Result, Work
from glm_jax.inference.batch import Decoder


class Texts(Work):
    """A text, scored in windows."""

    form = staticmethod(records.document)

    def __init__(self, decoder: Decoder, tokenizer: Tokenizer, task: Task, file: Path) -> None:
        self.decoder, self._tokenizer, self._task = decoder, tokenizer, task
        self._documents: list[Document] = self.form(tokenizer, file)
        self._cutting = rows.windows(decoder.config.model, tokenizer, task.reading, task.stride)
        if self._cutting.width < 2:
            raise UserError(f"{task.file}: max_seq_length {task.reading.longest} leaves no room for text: raise it")
        self._units = [
            (place, number)
            for place, document in enumerate(self._documents)
            for number in range(self._cutting.count(len(document.tokens)))
        ]
        self.count, self.items = len(self._units), len(self._documents)

    def run(self, numbers: Sequence[int]) -> Batches:
        """Score windows; each token counts once."""
        units = [self._units[number] for number in numbers]
        asked = [(self._documents[place].tokens, number) for place, number in units]
        for batch in score.windows(self.decoder, self._tokenizer, asked, self._cutting, self._task.reading):
            yield [(numbers[place], {"nats": -found.log_probability, "tokens": found.tokens}) for place, found in batch]

    def tokens(self, number: int) -> int:
        """Return the tokens of a window."""
        place, window = self._units[number]
        return min(len(self._documents[place].tokens) - window * self._cutting.stride, self._cutting.width)

    def texts(self) -> list[list[str]]:
        """Return the documents."""
        return [[self._tokenizer.decode(document.tokens)] for document in self._documents]

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return the nats of each window, and its part of the text's words and bytes."""
        nats = np.array([result["nats"] for result in results])
        tokens = np.array([float(result["tokens"]) for result in results])
        parts = tokens / np.array([len(self._documents[place].tokens) for place, _ in self._units])
        words = parts * np.array([self._documents[place].words for place, _ in self._units])
        size = parts * np.array([self._documents[place].size for place, _ in self._units])
        by = {"PPL": words, "BPB": size, "Nats a token": tokens}
        return {name: np.stack([nats, by[name]], axis=1) for name in dict.fromkeys([*self._task.metrics, *by])}


class Pile(Texts):
    """The Pile: documents windowed one by one, bits a byte of each set and weighted as in its training split.

    Reads records.pile.
    """

    form = staticmethod(records.pile)

    def columns(self, results: Sequence[Result]) -> Columns:
        """Return nats and bytes of each document."""
        sums = np.zeros(len(self._documents))
        for (place, _), result in zip(self._units, results, strict=True):
            sums[place] += result["nats"]
        both = np.stack([sums, np.array([float(document.size) for document in self._documents])], axis=1)
        groups = [document.group for document in self._documents]
        found = Columns()
        if all(group in measures.PILE for group in groups):
            places = np.array([[*measures.PILE].index(group) for group in groups])
            spread = np.zeros((len(groups), len(measures.PILE), 2))
            spread[np.arange(len(groups)), places] = both
            found["Pile BPB"] = spread.reshape(len(groups), -1)
        found["BPB"] = both
        for part in sorted(set(groups)):
            found[f"BPB/{part}"] = both[np.array([group == part for group in groups])]
        return found
