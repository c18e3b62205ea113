from typing import Any
from xml.etree import ElementTree

import jax.numpy as jnp
import numpy as np
import pytest
from matplotlib.colors import to_hex

from glm_jax.config.data import OBJECTIVES
from glm_jax.data.rows.blanks import blank_one, blank_spans
from glm_jax.data.rows.rows import Rows
from glm_jax.figures import batch as figures_batch
from glm_jax.model import Visibility

NAMES = {0: "pad", 1: "eos", 2: "[MASK]", 3: "[gMASK]", 4: "[sMASK]", 5: "sop", 6: "eop", 10: " a", 11: "\n", 12: "<&"}


class Words:
    """A tokenizer that writes ids above 12 as one Chinese character each, and 99 as part of one."""

    pad, eos, mask, gmask, smask, sop, eop = range(7)
    prefix: tuple[int, ...] = ()
    token_bytes = np.array([0] * 7 + [3] * 93)

    def decode(self, ids, *, specials=False):
        assert specials
        return "".join(NAMES.get(token, "\ufffd" if token == 99 else chr(0x4E00 + token)) for token in ids)


WORDS = Words()
SVG = "{http://www.w3.org/2000/svg}"


def axes(figure) -> list[Any]:
    return figure.axes


def row(samples, length, objective, streams=1) -> Rows[np.ndarray]:
    """Return a batch of one row."""
    batch = Rows.empty(1, length, WORDS.pad, two_streams=streams == 2)
    batch.fill(0, samples, OBJECTIVES[objective])
    return batch


def spans(streams=1, length=20):
    """Return a row of eight tokens with the blanks 12 13 and 16, whose blocks come in the other order."""
    tokens = np.array([10, 11, 12, 13, 14, 15, 16, 99], np.int32)
    sample = blank_spans(tokens, np.array([2, 6]), np.array([2, 1]), np.array([1, 0]), WORDS.mask, WORDS)
    return row([sample], length, 0, streams)


def packed():
    """Return a row of two prompts with answers, each with one blank at the end."""
    tokens = np.array([10, 20, 21, 22], np.int32)
    return row([blank_one(tokens, 2, 4, WORDS.mask, WORDS), blank_one(tokens, 1, 4, WORDS.mask, WORDS)], 16, 3)


def test_a_target_has_the_number_of_its_blank():
    #     reads a ⏎ [MASK] 14 15 [MASK] 99 | sop 16 | sop 12 13
    assert figures_batch.blanks(spans(), 0, WORDS).tolist() == [0, 0, 1, 0, 0, 2, 0, 2, 2, 1, 1, 1] + [0] * 8
    # each [MASK] of packed prompts has its own number, whatever the positions are
    assert figures_batch.blanks(packed(), 0, WORDS).tolist() == [0, 0, 1, 1, 1, 1, 0, 2, 2, 2, 2, 2, 0, 0, 0, 0]


def test_tokens_have_their_text_colour_target_and_positions():
    tokens = figures_batch.row_tokens(spans(streams=2), 0, WORDS)
    assert [token.text for token in tokens[:3]] == ["␣a", "⏎", "[MASK]"] and tokens[6].text == "▯"
    assert [token.bold for token in tokens[:3]] == [False, False, True]
    assert [token.target for token in tokens[6:10]] == ["", chr(0x4E10), "eop", "<&"]
    assert [token.positions for token in tokens[6:10]] == [(6, 0), (5, 1), (5, 2), (2, 1)]
    first, second = figures_batch.PALETTE[:2]
    assert [token.colour for token in tokens] == [*[figures_batch.PLAIN] * 2, first, *[figures_batch.PLAIN] * 2, second,
                                                  figures_batch.PLAIN, second, second, first, first, first]  # fmt: skip


@pytest.mark.parametrize("streams", [1, 2])
def test_the_svg_holds_every_token_and_nothing_overlaps(streams):
    document = figures_batch.tokens_svg(spans(streams), 0, WORDS, "row 7:")
    root = ElementTree.fromstring(document)
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert texts[0] == "row 7: mask, 12 of 20 places"
    boxes = [rect for rect in root.iter(f"{SVG}rect")][1:]
    assert len(boxes) == 12 and texts.count("sop") == 2 and texts.count("<&") == 2  # read and predicted
    assert ("in block" in texts) == (streams == 2)
    edges = [(float(box.attrib["x"]), float(box.attrib["x"]) + float(box.attrib["width"])) for box in boxes]
    assert all(left[1] <= right[0] for left, right in zip(edges, edges[1:], strict=False))
    assert max(right for _, right in edges) <= float(root.attrib["width"])


def test_packed_samples_have_their_own_lines_and_long_rows_wrap():
    def tops(batch):
        root = ElementTree.fromstring(figures_batch.tokens_svg(batch, 0, WORDS))
        return [float(box.attrib["y"]) for box in root.iter(f"{SVG}rect") if box.get("rx")], float(
            root.attrib["height"]
        )

    places, height = tops(packed())
    assert places == [places[0]] * 6 + [places[6]] * 6 and places[0] < places[6] < height
    long = row([blank_one(np.full(80, 30, np.int32), 40, 80, WORDS.gmask, WORDS)], 90, 1)
    places, height = tops(long)
    assert len(set(places)) == 3 and max(places) < height - 40


def test_visible_pairs_are_the_models_and_are_told_apart():
    batch = packed()
    kinds = figures_batch.visible(batch, 0)
    allowed = np.asarray(Visibility(jnp.asarray(batch.segments), jnp.asarray(batch.context)).dense())[0]
    filled = batch.segments[0] > 0
    np.testing.assert_array_equal(kinds > 0, allowed & filled[:, None])
    assert kinds[0, 1] == 1 and kinds[4, 1] == 2 and kinds[4, 3] == 3 and kinds[3, 4] == 0 and kinds[0, 3] == 0
    assert kinds[7, 1] == 0 and kinds[13, 13] == 0  # another sample, padding


def test_the_visibility_figure_shows_the_pairs_and_the_segments():
    figure = figures_batch.visibility_figure(packed(), [0], ["packed"])
    (axis,) = axes(figure)
    np.testing.assert_array_equal(axis.images[0].get_array(), figures_batch.visible(packed(), 0))
    assert axis.images[0].get_clim() == (0, 3)
    assert sorted(line.get_xdata()[0] for line in axis.lines[::2]) == [5.5, 11.5]
    assert axis.get_xlabel() == "key, place in the row" and axis.get_ylabel() == "query, place in the row"
    assert [text.get_text() for text in figure.legends[0].texts] == list(figures_batch.LEGEND)


@pytest.mark.parametrize("streams", [1, 2])
def test_the_positions_figure_draws_each_stream_and_shades_targets(streams):
    figure = figures_batch.positions_figure(spans(streams), [0], ["[MASK]"])
    (axis,) = axes(figure)
    assert [line.get_label() for line in axis.lines] == ["position", "place in the target block"][:streams]
    assert axis.lines[0].get_ydata().tolist() == [0, 1, 2, 3, 4, 5, 6, 5, 5, 2, 2, 2]
    if streams == 2:
        assert axis.lines[1].get_ydata().tolist() == [0] * 7 + [1, 2, 1, 2, 3]
    (shade,) = axis.patches
    assert (shade.get_x(), shade.get_width()) == (6.5, 5)
    assert axis.get_xlabel() == "place in the row" and axis.get_ylabel() == "position"


def test_blanks_have_light_colours_that_differ():
    assert len(set(figures_batch.PALETTE)) == 5 and figures_batch.PLAIN not in figures_batch.PALETTE
    assert all(to_hex(colour) == colour for colour in figures_batch.PALETTE)
