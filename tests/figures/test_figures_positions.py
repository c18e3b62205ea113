from typing import Any

import numpy as np
import pytest

from glm_jax.figures import positions as figures_positions
from glm_jax.figures import style
from glm_jax.figures.positions import alibi_bias, as_matrices, learned_similarity, rotary_similarity
from glm_jax.model import GLMConfig

SHAPE: dict[str, Any] = dict(hidden_size=32, num_heads=2, ffn_size=8, vocab_size=16)
ROTARY = GLMConfig(1, **SHAPE)
STREAMS = GLMConfig(1, **SHAPE, position="learned_2d", max_length=16)


def axes(figure) -> list[Any]:
    return figure.axes


def test_rotary_similarity_is_the_mean_cosine_over_frequencies():
    positions = np.array([0, 3, 5, 5])
    frequencies = 10_000.0 ** -(np.arange(8) / 8)
    expected = np.cos((positions[:, None] - positions)[..., None] * frequencies).mean(axis=-1)
    np.testing.assert_allclose(rotary_similarity(ROTARY, positions), expected, atol=1e-5)


def test_alibi_bias_falls_with_the_distance_by_a_slope_a_head():
    bias = alibi_bias(ROTARY, np.array([0, 2, 7]))
    np.testing.assert_allclose(bias[0, 0], [0, -2 / 16, -7 / 16])
    np.testing.assert_allclose(bias[1, 2], [-7 / 256, -5 / 256, 0])


@pytest.mark.slow
def test_learned_similarity_knows_tokens_by_both_streams():
    streams = np.array([[0, 1, 1, 1], [0, 0, 1, 0]])
    similarity = learned_similarity(STREAMS, streams, seed=0)
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    np.testing.assert_allclose(similarity[1, 3], 1, atol=1e-5)  # equal in both
    assert similarity[1, 2] < 0.95 and similarity[0, 1] < 0.95


def test_distances_are_drawn_for_each_model_and_each_head():
    left, right = axes(figures_positions.against_distance({"small": ROTARY}, ROTARY, 9))
    np.testing.assert_allclose(left.lines[0].get_ydata(), rotary_similarity(ROTARY, np.arange(10))[0], rtol=1e-6)
    assert [text.get_text() for text in right.get_legend().texts] == ["slope 1/16", "slope 1/256"]
    np.testing.assert_allclose(right.lines[0].get_ydata()[9], np.exp(-9 / 16))


def test_matrices_name_the_parts_of_the_row():
    values = np.where(np.tri(5, dtype=bool), 1.0, np.nan)
    figure = as_matrices({"one": values, "two": 2 * values}, [3], ["context", "target"])
    one, two = axes(figure)[:2]
    assert [one.get_title(loc="left"), two.get_title(loc="left")] == ["one", "two"]
    assert [text.get_text() for text in one.get_xticklabels()] == ["context", "target"]
    assert list(one.get_xticks()) == [1, 3.5]
    np.testing.assert_array_equal(two.images[0].get_array().filled(-1), np.where(np.tri(5), 2, -1))
    assert [line.get_ydata()[0] for line in one.lines[:1]] == [2.5]
    style.png(figure)
