"""Members' results on disk, and the tables made from them."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.sweeps import results
from glm_jax.sweeps.results import number, read_member, save_member, spread, summary, write_tables


def result(norm: str, seed: int, loss: float, reason: str | None = None) -> dict[str, Any]:
    return {
        "name": f"norm={norm},seed={seed}", "labels": {"model.norm": norm, "seed": str(seed)},
        "status": "diverged" if reason else "finished", "step": 2 if reason else None, "reason": reason,
        "loss": loss, "heldout": {"loss": loss + 0.5}, "warmup": 2, "uniform": 7.0, "unigram": 6.0,
        "curves": {"loss": [5.5, None, 7.0] if reason else [7.0, None, 3.0], "step": [1, 3]}, "run": {"seconds": 12.5},
    }  # fmt: skip


@pytest.fixture
def workdir(tmp_path: Path) -> Path:
    names = [f"norm={norm},seed={seed}" for norm in ("pre", "post") for seed in (1, 2)]
    (tmp_path / "sweep.json").write_text(json.dumps({"title": "Norms", "members": names}))
    return tmp_path


def test_numbers_are_saved_so_that_a_float32_comes_back() -> None:
    values = np.random.default_rng(0).normal(size=1000).astype(np.float32)
    assert all(np.float32(number(float(value))) == value for value in values)
    assert number(float("nan")) is None and number(float("inf")) is None


def test_a_result_comes_back_with_its_curves(workdir: Path) -> None:
    save_member(workdir, result("pre", 1, 5.0, "risen"))
    (back,) = results.read_all(workdir)
    assert back["heldout"] == {"loss": 5.5} and back["run"] == {"seconds": 12.5}
    np.testing.assert_array_equal(back["curves"]["loss"], [5.5, np.nan, 7.0])
    assert results.judge_again(back).reason == "risen"  # m ends at 6.27


def test_a_row_is_judged_by_the_rule_as_it_is_now(workdir: Path) -> None:
    old = {"status": "finished", "step": None, "reason": None}
    save_member(workdir, {**result("pre", 1, 5.0, "risen"), **old})
    (row,) = write_tables(workdir)
    assert (row["status"], row["step"], row["reason"]) == ("diverged", 2, "risen")


def test_tables_grow_as_members_come_and_leave_the_clock_out(workdir: Path) -> None:
    assert write_tables(workdir) == []
    assert "0 of 4 members are there" in (workdir / "results.md").read_text()
    save_member(workdir, result("pre", 1, 5.0))
    save_member(workdir, result("pre", 2, 5.2))
    save_member(workdir, result("post", 1, 7.1, "risen"))
    rows = write_tables(workdir)
    assert rows == json.loads((workdir / "results.json").read_text()) and len(rows) == 3
    assert all("run" not in row and "curves" not in row for row in rows)
    text = (workdir / "results.md").read_text()
    assert text.startswith("# Norms\n\n3 of 4 members are there.")
    assert "| pre | 2 of 2 | 5.100 ± 0.141 | 5.600 ± 0.141 |  |" in text
    assert "| post | 0 of 1 |  |  | risen (1) |" in text
    assert "| pre | 1 | finished | 5.000 | 5.500 |" in text
    assert "| post | 1 | diverged at 2: risen | 7.100 | 7.600 |" in text


def test_losses_that_are_not_there(workdir: Path) -> None:
    bare = {**result("pre", 1, 5.0), "heldout": {}}
    lost = {**result("post", 1, 5.0, "not finite"), "loss": None, "heldout": {"loss": None}}
    assert "| pre | 1 of 1 | 5.000 |  |  |" in summary([bare, lost])
    assert "| post | 1 | diverged at 2: not finite |  |  |" in results.members_table([bare, lost])
    assert spread([]) == "" and spread([1.0, 2.0, 3.0]) == "2.000 ± 1.000"


@pytest.mark.parametrize("text", ["", "[]", '{"name": 3}', '{"curves": [1]}'])
def test_damaged_results(workdir: Path, text: str) -> None:
    path = workdir / "members" / "norm=pre,seed=1.json"
    path.parent.mkdir()
    path.write_text(text)
    with pytest.raises(UserError, match="is damaged: delete it"):
        read_member(path)
    (workdir / "sweep.json").write_text(text)
    with pytest.raises(UserError, match=r"sweep\.json is damaged"):
        write_tables(workdir)
    with pytest.raises(UserError, match="holds no sweep"):
        write_tables(workdir / "elsewhere")


def test_skipped_steps_have_a_column_where_there_are_any() -> None:
    rows = [{**result("pre", seed, 5.0), "skipped": skipped} for seed, skipped in ((1, 0), (2, 3))]
    assert summary(rows).splitlines()[0].endswith("| diverged | skipped steps, by seed |")
    assert summary(rows).endswith("|  | 0 / 3 |")
    assert "skipped" not in summary([{**row, "skipped": 0} for row in rows])


@pytest.mark.parametrize(
    ("commit", "told"),
    [
        ("0123456789abcdef", "commit `0123456789ab`,"),
        ("0123456789abc+", "commit `0123456789ab+`,"),
        (None, "no commit,"),
    ],
)
def test_results_of_a_changed_tree_say_so(commit: str | None, told: str) -> None:
    base = {"train.steps": 300, "train.global_batch": 8, "data.seq_length": 64}
    description = {"command": "glm-jax sweep", "commit": commit, "versions": {"jax": "1"}, "base": base}
    assert results.provenance({**description, "members": ["a"]}, [{}]) == (
        f"`glm-jax sweep`, {told} jax 1; 1 of 1 members, 300 steps of 8 rows of 64 tokens"
    )
