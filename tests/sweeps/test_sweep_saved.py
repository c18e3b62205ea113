import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from sweep_cases import tiny, write_text

from glm_jax.config import default_config, resolve, small_english, with_changes
from glm_jax.config.fields import to_dict
from glm_jax.errors import UserError
from glm_jax.sweeps import results as sweep_results
from glm_jax.sweeps import saved as sweep_saved
from glm_jax.sweeps import worker
from glm_jax.sweeps.group import Outcome
from glm_jax.sweeps.saved import Saved, load, save, thin
from glm_jax.sweeps.verdict import RULE

COMMITTED = Path(__file__).parents[2] / "experiments" / "ablations" / "results"
BASE = {"train.steps": 100, "train.global_batch": 4, "data.seq_length": 32}


def result(name, loss=4.0, steps=100):
    losses = [None if step == 50 else loss for step in range(steps)]
    logged = [1, *range(10, steps + 1, 10)]
    watched = ("grad_norm", "grad_norm/embedding", "grad_norm/blocks_0_1", "attention_scores/layer_00")
    norms = {key: [0.123456789] * len(logged) for key in watched}
    curves = {"loss": losses, "step": logged, "activation_rms": [1.0] * len(logged), "lr": [0.1] * len(logged), **norms}
    axis, _, label = name.partition("=")
    return {"name": name, "labels": {axis: label}, "status": "finished", "loss": loss, "heldout": {"loss": loss},
            "warmup": 2, "uniform": 6.0, "unigram": 5.0, "curves": curves, "run": {"seconds": 1.0}}  # fmt: skip


@pytest.fixture
def workdir(tmp_path):
    """A sweep in which one member of two is done."""
    description = {
        "title": "T",
        "command": "glm-jax sweep --config a.py --workdir runs/a",
        "commit": "abcdef0123456789",
        "versions": {"jax": "0.10.2"},
        "base": BASE,
        "rule": {"decay": 0.5},
        "axes": {"k": {"a": {}, "b": {}}},
        "members": ["k=a", "k=b"],
    }
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "sweep.json").write_text(json.dumps(description))
    sweep_results.save_member(tmp_path / "sweep", result("k=b"))
    return tmp_path / "sweep"


def test_a_sweep_saved_in_parts(workdir, tmp_path):
    folder = tmp_path / "saved"
    save(workdir, folder)
    first = {name: (folder / name).read_text() for name in ("results.json", "curves.json")}
    save(workdir, folder)
    assert first == {name: (folder / name).read_text() for name in first}
    description = json.loads((workdir / "sweep.json").read_text())
    (workdir / "members" / "k=b.json").unlink()
    sweep_results.save_member(workdir, result("k=a", loss=3.0))
    (workdir / "sweep.json").write_text(json.dumps({**description, "commit": "123456", "base": {**BASE, "new": 1}}))
    assert save(workdir, folder) == 2
    saved = load(folder)
    assert [(found["name"], found["loss"], found["commit"]) for found in saved.results] == [
        ("k=a", 3.0, "123456"), ("k=b", 4.0, "abcdef0123456789"),
    ]  # fmt: skip
    assert "commits `123456`, `abcdef012345`, jax 0.10.2; 2 of 2 members" in saved.origin()
    (workdir / "sweep.json").write_text(json.dumps({**description, "base": {**BASE, "train.steps": 200}}))
    with pytest.raises(UserError, match="holds results of another sweep"):
        save(workdir, folder)


def test_what_is_saved_is_read_back(workdir, tmp_path):
    assert save(workdir, tmp_path / "saved") == 1
    saved = load(tmp_path / "saved")
    (found,) = saved.results
    assert saved.members == 2 and found["name"] == "k=b" and "run" not in found
    assert saved.description["rule"] == RULE  # the rule that judges the rows, whatever rule the sweep began with
    assert sorted(found["curves"]) == sorted(
        [
            "loss_step",
            "loss",
            "step",
            "grad_norm",
            "grad_norm/embedding",
            "grad_norm/blocks_0_1",
            "activation_rms",
            "attention_scores/layer_00",
        ]
    )
    np.testing.assert_allclose(found["curves"]["grad_norm/embedding"], 0.1235)  # four digits
    np.testing.assert_array_equal(found["curves"]["step"], [1, *range(10, 101, 10)])
    np.testing.assert_allclose(found["curves"]["loss"], 4.0)
    assert sorted(path.name for path in (tmp_path / "saved").iterdir()) == ["curves.json", "results.json", "sweep.json"]


def test_the_origin_says_how_much_is_there(workdir, tmp_path):
    save(workdir, tmp_path / "saved")
    text = load(tmp_path / "saved").origin()
    assert "results, incomplete:**" in text and "1 of 2 members" in text and "By k: a: 0 of 1, b: 1 of 1." in text
    assert "`glm-jax sweep --config a.py --workdir runs/a`" in text and "`abcdef012345`" in text and "0.10.2" in text
    sweep_results.save_member(workdir, result("k=a"))
    save(workdir, tmp_path / "saved")
    text = load(tmp_path / "saved").origin()
    assert "results, complete:**" in text and "2 of 2 members" in text and "By k" not in text


def test_curves_are_thinned_from_the_end_and_keep_both_ends():
    curves = thin(result("k=a", steps=100), 10)
    assert curves["loss_step"] == [1, 10, 20, 30, 40, 50, 60, 70, 80, 90, 100]
    assert thin(result("k=a", steps=5), 10)["loss_step"] == [1, 2, 3, 4, 5]
    broken = result("k=a")
    broken["curves"]["grad_norm"][3] = None
    assert thin(broken, 100)["grad_norm"][3] is None


def test_a_large_sweep_has_fewer_points(workdir, tmp_path, monkeypatch):
    monkeypatch.setattr(sweep_saved, "LARGEST", 1000)
    save(workdir, tmp_path / "saved")
    assert len(load(tmp_path / "saved").results[0]["curves"]["loss"]) <= sweep_saved.FEWEST + 1


def test_labels_can_be_renamed_and_chosen():
    results = [result("choice=base"), result("choice=alibi"), result("choice=gelu")]
    renamed = Saved({}, results).renamed("choice", "position", {"base": "rope", "alibi": "alibi"})
    assert [found["labels"] for found in renamed.results] == [{"position": "rope"}, {"position": "alibi"}]
    assert results[0]["labels"] == {"choice": "base"}


def test_a_sweep_without_a_result_is_refused(workdir, tmp_path):
    next((workdir / "members").iterdir()).unlink()
    with pytest.raises(UserError, match="no finished member yet"):
        save(workdir, tmp_path / "saved")


@pytest.mark.parametrize("name", ["results.json", "curves.json"])
def test_damaged_files_are_refused(workdir, tmp_path, name):
    save(workdir, tmp_path / "saved")
    (tmp_path / "saved" / name).write_text("{}" if name == "curves.json" else "{")
    with pytest.raises(UserError, match="write them again"):
        load(tmp_path / "saved")


@pytest.mark.slow
def test_a_small_sweep_is_trained_on_the_spot(tmp_path, monkeypatch):
    texts = write_text(tmp_path).read_text().split("\n\n")
    monkeypatch.setattr(sweep_saved, "standard_docstrings", lambda: texts)
    base = default_config()
    base.model.update(to_dict(tiny(tmp_path).model))
    base.data.seq_length, base.data.tokenizer.vocab_size = 16, 300
    base.train.steps, base.train.global_batch, base.train.log_every, base.train.eval_rows = 4, 2, 2, 2
    base.optimizer.warmup_samples = 2
    saved = sweep_saved.train_small(base, {"seed": (1, 2)})
    assert [found["labels"] for found in saved.results] == [{"seed": "1"}, {"seed": "2"}]
    for found in saved.results:
        np.testing.assert_array_equal(found["curves"]["loss_step"], [1, 2, 3, 4])
        np.testing.assert_array_equal(found["curves"]["step"], [1, 2, 4])
        assert np.isfinite(found["curves"]["grad_norm/embedding"]).all() and found["heldout"]["loss"] > 0
    assert "No saved results: 2 small members" in saved.origin()


def test_the_standard_library_has_text_enough():
    texts = sweep_saved.standard_docstrings()
    assert sum(map(len, texts)) > 100_000


@pytest.mark.parametrize("folder", sorted(COMMITTED.glob("*/sweep.json")), ids=lambda path: path.parent.name)
def test_committed_results_can_be_read(folder):
    saved = load(folder.parent)
    assert 0 < len(saved.results) <= saved.members
    for found in saved.results:
        assert {"loss_step", "loss", "step", "grad_norm/embedding"} <= found["curves"].keys()
    assert (folder.parent / sweep_saved.CURVES).stat().st_size < 1 << 20


def test_a_member_on_stairs_says_where_it_broke() -> None:
    """Its average is 0.512 above the lowest 14 steps after a jump of 1, on the second stair of 10: 1e-3 * 2 * 2."""
    changes = {"optimizer.stairs": (100, 10, 2), "optimizer.peak_lr": 1e-3, "optimizer.min_lr": 1e-3}
    config = with_changes(resolve(small_english(steps=130)), changes)
    losses = np.array([1.0] * 100 + [2.0] * 30)
    outcome = Outcome(losses, {}, np.array([130]), {}, 9.0, 8.0, 0)
    assert worker.result(config, outcome)["broke"] == {"step": 114, "lr": 0.004}
    assert worker.result(config, dataclasses.replace(outcome, losses=np.ones(130)))["broke"] is None
    assert "broke" not in worker.result(resolve(small_english(steps=130)), outcome)
