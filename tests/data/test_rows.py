"""Rows by hand: where samples go in a row, and what padding is."""

from typing import Any

import numpy as np
import pytest

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.blanks import Sample, sample_positions
from glm_jax.data.rows.rows import Rows


def sample(context: int, *streams: list[int]) -> Sample:
    tokens, targets, positions, inside = (np.array(values, np.int32) for values in streams)
    return Sample(tokens, targets, positions, inside, context)


ONE = sample(2, [9, 5, 2, 8], [9, 5, 8, 3], [0, 1, 1, 1], [0, 0, 1, 2])
TWO = sample(1, [7, 2, 4], [7, 4, 3], [0, 1, 2], [0, 1, 2])


@pytest.mark.parametrize("two_streams", [False, True])
def test_samples_fill_a_row_one_after_another(two_streams: bool) -> None:
    rows = Rows.empty(2, 9, pad=1, two_streams=two_streams)
    rows.fill(1, [ONE, TWO], "gmask", 3)
    assert rows.tokens.tolist() == [[1] * 9, [9, 5, 2, 8, 7, 2, 4, 1, 1]]
    assert rows.targets.tolist() == [[1] * 9, [9, 5, 8, 3, 7, 4, 3, 1, 1]]
    assert rows.segments.tolist() == [[0] * 9, [1, 1, 1, 1, 2, 2, 2, 0, 0]]
    assert rows.context.tolist() == [[False] * 9, [True, True, False, False, True, False, False, False, False]]
    assert rows.loss_mask.tolist() == [[0] * 9, [0, 0, 1, 1, 0, 1, 1, 0, 0]]
    first, second = [0, 1, 1, 1, 0, 1, 2, 0, 0], [0, 0, 1, 2, 0, 1, 2, 0, 0]
    assert rows.positions[1].tolist() == ([first, second] if two_streams else first) and not rows.positions[0].any()
    assert (rows.objective.tolist(), rows.source.tolist()) == ([0, OBJECTIVES.index("gmask")], [0, 3])
    assert [str(array.dtype) for array in rows] == ["int32"] * 4 + ["bool", "float32", "int32", "int32"]


def test_taken_padded_and_abstract_rows() -> None:
    rows = Rows.empty(3, 4, pad=1)
    for row in range(3):
        rows.fill(row, [sample(1, [row, 2, 4], [row, 4, 3], [0, 1, 2], [0, 1, 2])], "mask", row)
    taken = rows.take(np.array([2, 0]))
    assert taken.source.tolist() == [2, 0] and taken.tokens[:, 0].tolist() == [2, 0]
    padded = taken.pad(4)
    assert padded.source.tolist() == [2, 0, 0, 0] and padded.segments[:, 0].tolist() == [1, 1, 0, 0]
    assert not padded.loss_mask[2:].any() and (padded.tokens[:2] == taken.tokens).all()
    for two_streams in (False, True):
        made: Any = Rows.empty(6, 4, pad=0, two_streams=two_streams)
        for array, described in zip(made, Rows.abstract((2, 3, 4), two_streams=two_streams), strict=True):
            assert described.shape == (2, 3, *array.shape[1:]) and described.dtype == array.dtype


def test_blocks_repeat_their_blanks_position_or_continue_the_count() -> None:
    blanks, widths = np.array([2, 0]), np.array([1, 3])
    first, second = sample_positions(4, blanks, widths, repeat=True)
    assert first.tolist() == [0, 1, 2, 3, 2, 0, 0, 0] and second.tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
    first, second = sample_positions(4, blanks, widths, repeat=False)
    assert first.tolist() == [0, 1, 2, 3, 4, 5, 6, 7] and second.tolist() == [0, 0, 0, 0, 1, 1, 2, 3]
