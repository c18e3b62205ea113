"""The stability frontier by hand, and the page that shows it."""

import json
from pathlib import Path
from typing import Any

import pytest

from glm_jax.errors import UserError
from glm_jax.sweeps.frontier import breaking_table, frontier, frontier_table, learnt, sensitivity, sensitivity_table
from glm_jax.sweeps.page import section, write_page


def row(norm: str, lr: str, seed: str, loss: float | None) -> dict[str, Any]:
    """Return a row of results.json; without a loss, it diverged."""
    return {
        "labels": {"model.norm": norm, "lr": lr, "seed": seed}, "status": "diverged" if loss is None else "finished",
        "step": 9, "reason": "risen", "loss": loss, "heldout": {"loss": loss},
    }  # fmt: skip


ROWS = [
    row("pre", "0.001", "1", 5.0), row("pre", "0.01", "1", 4.0), row("pre", "0.1", "1", None),
    row("pre", "0.001", "2", 5.2), row("pre", "0.01", "2", 4.2), row("pre", "0.1", "2", 4.5),
    row("post", "0.001", "1", None), row("post", "0.01", "1", 4.0), row("post", "0.1", "1", None),
    row("deepnorm", "0.01", "1", 4.0),
]  # fmt: skip


def test_the_frontier_ends_at_the_first_rate_that_diverged() -> None:
    assert frontier(ROWS) == {("pre",): {"1": 0.01, "2": 0.1}, ("post",): {"1": None}}  # deepnorm is not complete


def test_the_frontier_as_a_table() -> None:
    lines = frontier_table(ROWS).splitlines()
    assert lines[0].startswith("| model.norm | highest stable rate, by seed | loss at 0.001 | loss at 0.01 |")
    assert lines[2] == "| pre | 0.01 / 0.1 | 5.100 ± 0.141 | 4.100 ± 0.141 | 1 diverged; 4.500 |"
    assert lines[3] == "| post | none | 1 diverged | 4.000 | 1 diverged |"
    assert len(lines) == 4


def test_sensitivity_counts_a_diverged_member_as_guessing() -> None:
    rows = [{**one, "unigram": 5.1} for one in ROWS]
    found = sensitivity(rows)
    assert found[("pre",)] == pytest.approx([(1.0 + 0 + 1.1) / 3, (0.9 + 0 + 0.3) / 3])  # 5.2 is worse than guessing
    assert found[("post",)] == pytest.approx([(1.1 + 0 + 1.1) / 3]) and found[("deepnorm",)] == []
    assert sensitivity_table(rows).splitlines()[3] == "| post | 0.733 |"


@pytest.fixture
def results(tmp_path: Path) -> Path:
    description = {
        "title": "Norms", "members": ["a"] * 12, "command": "glm-jax sweep --config norms.py",
        "commit": "0123456789abcdef",
        "versions": {"jax": "0.10.2"}, "base": {"train.steps": 300, "train.global_batch": 8, "data.seq_length": 64},
    }  # fmt: skip
    for name in ("norms", "objectives"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "sweep.json").write_text(json.dumps(description))
        (tmp_path / name / "results.json").write_text(json.dumps(ROWS))
    halves = [
        {**ROWS[0], "labels": {"objective": kind, "seed": "1"}, "heldout": {"loss": 5.0, "loss/second_half": half}}
        for kind, half in (("one", 4.25), ("other", 4.75))
    ]
    (tmp_path / "objectives" / "results.json").write_text(json.dumps(halves))
    return tmp_path


def test_a_page_has_its_tables_rewritten_and_the_rest_kept(results: Path) -> None:
    page = results / "page.md"
    places = "".join(f"<!-- {name}: begin -->\nold\n<!-- {name}: end -->\nkept\n" for name in ("norms", "objectives"))
    page.write_text(f"# Title\n{places}")
    assert write_page(page, results) == ["norms", "objectives"]
    text = page.read_text()
    assert "old" not in text and text.count("kept") == 2 and text.startswith("# Title\n<!-- norms: begin -->\n")
    assert "`glm-jax sweep --config norms.py`, commit `0123456789ab`, jax 0.10.2; 10 of 12 members, 300" in text
    assert "| pre | 0.01 / 0.1 |" in text and "| other | 1 of 1 | 5.000 | 4.750 |  |" in text
    write_page(page, results)
    assert page.read_text() == text


RESULTS = Path(__file__).parents[2] / "experiments/ablations/results"


@pytest.mark.parametrize("sweep", sorted(folder.parent.name for folder in RESULTS.glob("*/sweep.json")))
def test_the_page_of_the_docs_is_computed_from_the_committed_results(sweep: str) -> None:
    assert section(RESULTS / sweep) in (RESULTS.parents[2] / "docs/ablations.md").read_text(encoding="utf-8")


def test_a_page_without_a_place(results: Path) -> None:
    page = results / "page.md"
    page.write_text("<!-- norms: begin -->\n<!-- norms: end -->\n")
    with pytest.raises(UserError, match="one place for objectives"):
        write_page(page, results)
    assert page.read_text() == "<!-- norms: begin -->\n<!-- norms: end -->\n"
    with pytest.raises(UserError, match="cannot be read"):
        write_page(results / "nowhere.md", results)
    (results / "norms" / "results.json").unlink()
    with pytest.raises(UserError, match=r"results\.json cannot be read"):
        section(results / "norms")


def test_rates_at_which_members_broke() -> None:
    labels = [("8", "pre", "1"), ("8", "pre", "2"), ("8", "post", "1"), ("8", "post", "2")]
    broke = [{"step": 814, "lr": 0.0135}, None, {"step": 801, "lr": 0.0015}, {"step": 802, "lr": 0.0015}]
    assert not learnt({"unigram": 5.0, "loss_before_stairs": None})  # none was finite
    rows = [
        {
            "labels": dict(zip(("num_layers", "arm", "seed"), each, strict=True)),
            "broke": found, "unigram": 5.0, "loss_before_stairs": 4.8 if each[1:] != ("post", "2") else 4.95,
        }
        for each, found in zip(labels, broke, strict=True)
    ]  # fmt: skip
    assert breaking_table(rows).splitlines() == [
        "| num_layers | arm | seed 1 | seed 2 |",
        "| --- | --- | --- | --- |",
        "| 8 | pre | 0.0135 | not broken |",
        "| 8 | post | 0.0015 | (0.0015) |",
    ]


def test_breaking_is_compared_between_members_that_had_learnt(results: Path) -> None:
    """In seed 3 one had learnt nothing; the others' logarithms differ by 1 and by 2."""
    rates = {"post": (0.01, 0.1, 0.1), "pre": (0.1, 10.0, 0.1)}
    rows = [
        {
            "labels": {"arm": arm, "seed": str(seed)}, "broke": {"step": 9, "lr": rate}, "unigram": 5.0,
            "loss_before_stairs": 4.95 if (arm, seed) == ("pre", 3) else 4.0,
        }
        for arm, of_arm in rates.items()
        for seed, rate in enumerate(of_arm, 1)
    ]  # fmt: skip
    (results / "norms" / "results.json").write_text(json.dumps(rows))
    text = section(results / "norms")
    assert "| pre | 0.1 | 10 | (0.1) |" in text and "| pre - post | +1.500 [" in text and "(n = 2," in text
