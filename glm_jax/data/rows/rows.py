"""Rows: fixed-length training examples, and the one place that assembles samples into a batch of them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Generic, NamedTuple, TypeVar

import numpy as np

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.blanks import Sample

if TYPE_CHECKING:
    import jax

A = TypeVar("A")  # the arrays' type: np.ndarray on the host, jax.Array on a mesh

DTYPES = {"context": "bool", "loss_mask": "float32"}  # the others are int32


class Rows(NamedTuple, Generic[A]):
    """A batch of rows. On a mesh the arrays are [M, B/M, ...], M the microbatches.

    Query i may see key j where their segments are equal and j <= i or context[j]; see `model.Visibility`.
    """

    tokens: A  # int32 [B, S], what the model reads
    targets: A  # int32 [B, S]; targets[b, i] is what to predict at token i
    positions: A  # int32 [B, S], or [B, 2, S] with two streams
    segments: A  # int32 [B, S]: 1, 2, ... for the samples of a row, 0 for padding
    context: A  # bool [B, S], part A of each sample
    loss_mask: A  # float32 [B, S]: 1 at the target tokens that count
    objective: A  # int32 [B], index into OBJECTIVES
    source: A  # int32 [B], index into the names of the sources

    @staticmethod
    def empty(rows: int, length: int, pad: int, *, two_streams: bool = False) -> Rows[np.ndarray]:
        """Return `rows` rows of `length` places without samples: `pad` tokens outside the loss."""
        arrays = {name: np.zeros(shape, dtype) for name, shape, dtype in _layout((rows,), length, two_streams)}
        arrays["tokens"].fill(pad)
        arrays["targets"].fill(pad)
        return Rows(**arrays)

    @staticmethod
    def abstract(shape: Sequence[int], *, two_streams: bool = False) -> Rows[jax.ShapeDtypeStruct]:
        """Return the shapes and dtypes of rows [*shape], whose last axis is S."""
        import jax  # not needed to make rows

        arrays = _layout(shape[:-1], shape[-1], two_streams)
        return Rows(**{name: jax.ShapeDtypeStruct(whole, dtype) for name, whole, dtype in arrays})

    def fill(self: Rows[np.ndarray], row: int, samples: Iterable[Sample], objective: str, source: int = 0) -> None:
        """Write samples into an empty row, one after another.

        Args:
            row: its index in the batch.
            samples: must fit in the row together.
            objective: one of OBJECTIVES.
            source: index of the source that the text comes from.
        """
        self.objective[row], self.source[row] = OBJECTIVES.index(objective), source
        start = 0
        for segment, sample in enumerate(samples, 1):
            divide, stop = start + sample.context, start + len(sample)
            self.tokens[row, start:stop] = sample.tokens
            self.targets[row, start:stop] = sample.targets
            if self.positions.ndim == 2:
                self.positions[row, start:stop] = sample.positions
            else:
                self.positions[row, :, start:stop] = sample.positions, sample.block_positions
            self.segments[row, start:stop] = segment
            self.context[row, start:divide] = True
            self.loss_mask[row, divide:stop] = 1
            start = stop

    def causal(self: Rows[np.ndarray]) -> Rows[np.ndarray]:
        """Return the same rows, in which the tokens of a context see only what is before them."""
        return self._replace(context=np.zeros_like(self.context))

    def take(self: Rows[np.ndarray], places: np.ndarray) -> Rows[np.ndarray]:
        """Return the rows of the batch at `places`, int [n]."""
        return Rows(*(array[places] for array in self))

    def pad(self: Rows[np.ndarray], rows: int) -> Rows[np.ndarray]:
        """Return a batch of `rows` rows: these, then rows of zeros, which add nothing to the loss."""
        missing = rows - len(self.tokens)
        return Rows(*(np.pad(array, [(0, missing), *[(0, 0)] * (array.ndim - 1)]) for array in self))


def _layout(leading: Sequence[int], length: int, two_streams: bool) -> list[tuple[str, tuple[int, ...], str]]:
    """Return name, shape and dtype of each array."""
    shapes = {"positions": (*leading, 2, length) if two_streams else (*leading, length)}
    shapes |= {"objective": tuple(leading), "source": tuple(leading)}
    return [(name, shapes.get(name, (*leading, length)), DTYPES.get(name, "int32")) for name in Rows._fields]
