from typing import Any

import numpy as np
import pytest
from matplotlib.colors import to_hex

from glm_jax.figures import style, training
from glm_jax.figures.training import claims_table, final_losses, loss_against_rate, loss_curves, paired_table
from glm_jax.sweeps import verdict

SCHEMES = ("pre", "deepnorm")
RATES = ("0.001", "0.01")


def member(labels, loss, diverged=False, heldout: float | None = None) -> dict[str, Any]:
    curves = {"loss_step": np.array([1.0, 5, 10]), "loss": np.array([6.0, np.nan, loss])}
    return {
        "name": ",".join(labels.values()),
        "labels": labels,
        "status": "diverged" if diverged else "finished",
        "step": 10 if diverged else None,
        "reason": "learnt nothing" if diverged else None,
        "loss": loss,
        "heldout": {"loss": loss + 0.1 if heldout is None else heldout},
        "uniform": 6.2,
        "unigram": 5.0,
        "warmup": 2,
        "curves": curves,
    }


def norms(depths=("4",), diverged=(), losses=None):
    """Return the results of a grid; `diverged` names (scheme, rate, seed)."""
    found = []
    for depth in depths:
        for scheme in SCHEMES:
            for rate in RATES:
                for seed in ("1", "2"):
                    labels = {"model.num_layers": depth, "model.norm": scheme, "lr": rate, "seed": seed}
                    loss = (losses or {}).get((scheme, rate), 4.0) + 0.01 * int(seed)
                    found.append(member(labels, loss, (scheme, rate, seed) in diverged))
    return found


def settings(values):
    """Return the results of a family; `values` has the held-out losses of the seeds by label."""
    return [
        member({"model.position": label, "seed": str(seed)}, 4.0, loss is None, loss)
        for label, losses in values.items()
        for seed, loss in enumerate(losses, 1)
    ]


def axes(figure) -> list[Any]:
    return figure.axes


def test_labels_keep_their_order_unless_they_are_numbers():
    results = [member({"lr": lr, "norm": norm}, 4.0) for lr, norm in (("0.01", "pre"), ("5e-05", "post"))]
    assert training.labels(results, "lr") == ["5e-05", "0.01"]
    assert training.labels(results, "norm") == ["pre", "post"]


def test_loss_curves_have_a_panel_a_setting_and_a_shade_a_rate():
    results = norms(("16", "4"), diverged={("pre", "0.01", "2")})
    figure = loss_curves(results, "lr", "model.num_layers", "model.norm", "Loss")
    titles = [axis.get_title(loc="left") for axis in axes(figure)]
    assert titles == ["pre, 4 layers", "deepnorm, 4 layers", "pre, 16 layers", "deepnorm, 16 layers"]
    assert figure.get_suptitle() == "Loss"
    assert [text.get_text() for text in figure.legends[0].texts] == ["0.001", "0.01", "guess by frequency"]
    pre, deepnorm = axes(figure)[:2]
    assert len(deepnorm.lines) == 5 and len(pre.lines) == 6  # four members and the guess; in pre also a cross
    crosses = [line for line in pre.lines if line.get_marker() == "x"]
    assert [list(line.get_xdata()) for line in crosses] == [[10]]
    assert [line.get_linestyle() for line in pre.lines[:5]] == ["-", "-", "-", "--", "None"]
    first, second, third = (to_hex(line.get_color()) for line in pre.lines[:3])
    assert first == second != third
    assert pre.get_ylim() == deepnorm.get_ylim() and pre.get_xlim() == (0, 10)
    style.png(figure)


def test_a_panel_without_members_says_so_and_the_legend_has_full_lines():
    results = norms(("4",), diverged={("pre", "0.001", "1")})
    figure = loss_curves([*results, *norms(("8",))[:1]], "lr", "model.num_layers", "model.norm")
    assert [[text.get_text() for text in axis.texts] for axis in axes(figure)] == [[], [], [], ["not yet"]]
    assert [line.get_linestyle() for line in figure.legends[0].get_lines()[:2]] == ["-", "-"]
    assert {axis.get_xlim() for axis in axes(figure)} == {(0, 10)}


def test_one_panel_of_loss_curves_has_unlike_colours():
    figure = loss_curves(settings({"rope": [4.1], "alibi": [4.2]}), "model.position")
    (axis,) = axes(figure)
    assert [to_hex(line.get_color()) for line in axis.lines[:2]] == list(style.COLOURS[:2])
    assert axis.get_xlabel() == "step" and "nats" in axis.get_ylabel()


def test_the_frontier_marks_every_seed_the_gap_to_the_next_rate_and_none():
    results = norms(diverged={("pre", "0.01", "1"), ("pre", "0.001", "2"), ("pre", "0.01", "2")})
    figure = training.stability_frontier(results)
    (axis,) = axes(figure)
    marks = {line.get_label(): list(line.get_ydata()) for line in axis.lines if len(line.get_ydata()) == 2}
    np.testing.assert_allclose(
        marks["pre"], [0.001, 0.0001]
    )  # the second seed diverged at the lowest rate: the tick "none"
    assert marks["deepnorm"] == [0.01, 0.01]
    arrows = [line for line in axis.lines if line.get_marker() == r"$\uparrow$" and len(line.get_ydata()) == 1]
    assert [to_hex(line.get_color()) for line in arrows] == [style.COLOURS[1]]  # the grid ended before deepnorm did
    bars = [collection.get_segments()[0][:, 1] for collection in axis.collections]
    np.testing.assert_allclose(bars[0], [0.0001, 0.01])
    style.png(figure)
    assert [text.get_text() for text in axis.get_yticklabels()] == ["none", "0.001", "0.01"]
    assert [text.get_text() for text in axis.get_xticklabels()] == ["4"]


def test_a_setting_that_is_not_complete_has_no_frontier():
    results = [
        result for result in norms() if result["labels"]["model.norm"] == "pre" or result["labels"]["lr"] == "0.01"
    ]
    (axis,) = axes(training.stability_frontier(results))
    assert "deepnorm" not in axis.get_legend_handles_labels()[1]


def test_losses_against_rates_join_means_and_put_diverged_members_on_top():
    results = norms(diverged={("pre", "0.01", "1")}, losses={("pre", "0.01"): 4.5})
    (axis,) = axes(loss_against_rate(results))
    lines = {line.get_label(): line for line in axis.lines if line.get_label() in SCHEMES}
    np.testing.assert_allclose(
        lines["pre"].get_ydata(), [4.115, 4.62]
    )  # the mean of two seeds, and the one that finished
    np.testing.assert_allclose(lines["deepnorm"].get_ydata(), [4.115, 4.115])
    (cross,) = [line for line in axis.lines if line.get_marker() == "x" and len(line.get_xdata())]
    assert cross.get_ydata()[0] > 4.62 and cross.get_ydata()[0] < axis.get_ylim()[1]
    assert axis.get_title(loc="left") == "4 layers"


def test_losses_can_be_drawn_when_nothing_finished():
    every = {(scheme, rate, seed) for scheme in SCHEMES for rate in RATES for seed in "12"}
    results = norms(diverged=every)
    style.png(loss_against_rate(results))
    style.png(training.stability_frontier(results))
    style.png(final_losses(settings({"rope": [None], "alibi": [None]}), "model.position"))
    assert claims_table(results, SCHEMES).splitlines()[-1].startswith("| 4 | none | none | no more than pre | open")


def test_final_losses_have_a_mark_a_seed_and_a_bar_at_the_mean():
    (axis,) = axes(final_losses(settings({"rope": [4.0, 4.2], "alibi": [4.4, None]}), "model.position"))
    assert [text.get_text() for text in axis.get_xticklabels()] == ["rope", "alibi"]
    marks = {line.get_label(): line.get_ydata() for line in axis.lines if line.get_label().startswith("seed")}
    np.testing.assert_allclose(marks["seed 1"], [4.0, 4.4])
    np.testing.assert_allclose(marks["seed 2"], [4.2, np.nan])
    np.testing.assert_allclose([bar.get_segments()[0][0, 1] for bar in axis.collections], [4.1, 4.4])


def test_differences_are_taken_at_equal_seeds():
    lines = paired_table(settings({"rope": [4.0, 5.0], "alibi": [4.1, 5.3], "learned": [None, 4.5]}), "model.position")
    rope, alibi, learned = lines.splitlines()[2:]
    assert rope == "| rope | 2 | 0 | 4.500 ± 0.707 |  |"
    # 0.1 and 0.3: their spread over the root of 2 is 0.1, and with one degree of freedom 12.706 of these
    assert alibi == "| alibi | 2 | 0 | 4.700 ± 0.849 | +0.200 [-1.071, +1.471] (n = 2, p = 0.3) |"
    assert learned == "| learned | 1 | 1 | 4.500 |  |"


@pytest.mark.parametrize(
    ("losses", "diverged", "rate", "loss"),
    [
        ({("pre", "0.01"): 4.5}, {("pre", "0.01", "1"), ("pre", "0.01", "2")}, "yes", "within the spread of pre"),
        ({("deepnorm", "0.01"): 3.5}, (), "no more than pre", "yes"),
        ({("pre", "0.001"): 3.5}, {("deepnorm", "0.01", "1")}, "no: pre", "no: pre by 0.500"),
    ],
)
def test_claims_are_judged_by_the_median_rate_and_the_best_loss(losses, diverged, rate, loss):
    line = claims_table(norms(losses=losses, diverged=diverged), SCHEMES).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][4:6] == [rate, loss]


def test_a_depth_without_all_schemes_is_open():
    line = claims_table(norms(), (*SCHEMES, "post")).splitlines()[-1]
    assert [cell.strip() for cell in line.split("|")][4:7] == ["not yet", "open", "open"]


def test_a_margin_decides_what_has_learnt():
    results = norms(losses={("pre", "0.01"): 4.9})
    judged = training.with_margin(results, 0.2)
    lost = [result["name"] for result in judged if result["status"] == "diverged"]
    assert lost == ["4,pre,0.01,1", "4,pre,0.01,2"]
    again = training.with_margin(judged, 0.0)
    assert {result["status"] for result in again} == {"finished"} == {result["status"] for result in results}
    risen = [{**result, "status": "diverged", "reason": "risen"} for result in results]
    assert training.with_margin(risen, 0.0) == risen


def test_the_reason_is_the_verdicts():
    assert verdict.judge(np.full(50, 5.0), 2, uniform=6.2, unigram=5.0).reason == training.NOTHING


def test_reasons_are_counted_by_label():
    results = settings({"rope": [4.0, None], "alibi": [4.4, 4.5]})
    lines = training.reasons_table(results, "model.position").splitlines()
    assert lines[0] == "| model.position | finished | learnt nothing |"
    assert lines[2:] == ["| rope | 1 | 1 |", "| alibi | 2 | 0 |"]
