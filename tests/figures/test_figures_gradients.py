from typing import Any

import jax
import numpy as np
import pytest
from matplotlib.colors import to_hex

from glm_jax.figures import diagnostics, gradients, style
from glm_jax.figures.diagnostics import tiny
from glm_jax.figures.gradients import Paths, blocks, measure_paths, norms_table, paths_table, share


def member(label, seed, embedding=(8.0, 4.0, 8.0)) -> dict[str, Any]:
    curves = {
        "step": np.array([1.0, 10.0, 20.0]),
        "grad_norm": np.ones(3),
        "grad_norm/blocks_10_11": np.full(3, 4.0),
        "grad_norm/blocks_0_0": np.full(3, 3.0),
        "grad_norm/embedding": seed * np.array(embedding),
    }
    return {"labels": {"embedding": label, "seed": str(seed)}, "curves": curves, "warmup": 5}


RESULTS = [member(label, seed) for label in ("plain", "shrink") for seed in (1, 2)]


def axes(figure) -> list[Any]:
    return figure.axes


def test_layer_groups_come_from_the_bottom_up():
    assert list(blocks(RESULTS[0])) == ["layer 0", "layers 10–11"]


def test_a_share_is_over_all_layers_together():
    np.testing.assert_allclose(share(RESULTS[0]), np.array([8, 4, 8]) / 5)


def test_gradient_norms_have_a_panel_a_setting_and_the_embedding_stands_out():
    figure = gradients.gradient_norms(RESULTS, "embedding")
    plain, shrink = axes(figure)
    assert [plain.get_title(loc="left"), shrink.get_title(loc="left")] == ["plain", "shrink"]
    assert [line.get_label() for line in plain.lines] == ["layer 0", "layers 10–11", "embedding"]
    np.testing.assert_allclose(plain.lines[2].get_ydata(), [12, 6, 12])  # the median of the two seeds
    assert plain.lines[2].get_linewidth() > plain.lines[0].get_linewidth()
    band = plain.collections[2].get_paths()[0].vertices[:, 1]
    assert band.min() == 4 and band.max() == 16
    assert plain.get_yscale() == "log" and plain.get_ylim() == shrink.get_ylim()
    style.png(figure)


def test_shares_have_a_line_a_seed():
    (axis,) = axes(gradients.shares(RESULTS, "embedding"))
    assert len(axis.lines) == 4
    assert [to_hex(line.get_color()) for line in axis.lines[::2]] == list(style.COLOURS[:2])
    assert axis.get_legend_handles_labels()[1] == ["plain", "shrink"]


def test_the_table_looks_behind_the_warm_up():
    results = [member("plain", 1, (100.0, 4.0, 8.0)), member("plain", 2, (100.0, 4.0, 8.0))]
    line = norms_table(results, "embedding").splitlines()[-1]
    assert line == "| plain | 9 (6 to 12) | 1.8 (1.2 to 2.4) | 1.33 (1.33 to 1.33) |"


@pytest.mark.slow
def test_the_two_paths_add_up_to_the_gradient_of_the_tied_embedding():
    cfg = tiny("deepnorm", 2)
    params, rows = diagnostics.start(cfg, np.int32(3))
    tied = jax.grad(lambda params: diagnostics.loss(cfg, params, rows))(params)["embedding"]["word"]
    paths = measure_paths(cfg, 3)
    assert paths.both == pytest.approx(float(np.linalg.norm(tied)), rel=1e-4)
    assert min(paths.lookup, paths.head) > 0
    cosine = (paths.both**2 - paths.lookup**2 - paths.head**2) / (2 * paths.lookup * paths.head)
    assert paths.cosine == pytest.approx(cosine, abs=1e-5)


def test_the_shrink_acts_on_the_lookup_and_on_the_head_if_asked():
    cfg = tiny("deepnorm", 2)
    plain, shrunk = measure_paths(cfg, 3), measure_paths(cfg, 3, 0.1)
    whole = measure_paths(cfg, 3, 0.1, shrink_head=True)
    assert shrunk.lookup == pytest.approx(0.1 * plain.lookup) and shrunk.head == pytest.approx(plain.head)
    assert whole.both == pytest.approx(0.1 * plain.both) and shrunk.cosine == pytest.approx(plain.cosine)


def test_paths_are_written_with_their_range():
    table = paths_table({"a": [Paths(1, 2, 3, 0.1), Paths(2, 2, 4, 0.3)]})
    assert table.splitlines()[-1] == "| a | 1.5 (1 to 2) | 2 (2 to 2) | 3.5 (3 to 4) | 0.2 (0.1 to 0.3) |"
