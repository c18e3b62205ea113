"""Fine-tuning from given weights: adapters that are saved alone, resumed and merged, and parts that are frozen."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax import model
from glm_jax.cli import main
from glm_jax.config import Experiment, with_changes
from glm_jax.errors import UserError
from glm_jax.inference import Model
from glm_jax.interop import arrays
from glm_jax.interop.weights import open_weights
from glm_jax.training.run import Run
from glm_jax.types import Tree
from tests.stored import stored
from tests.training.test_init_from import begun, config, losses, params, trained

__all__ = ["config", "trained"]  # fixtures

pytestmark = pytest.mark.slow

LORA = {"train__lora__rank": 2, "train__lora__targets": ("blocks/attention",), "optimizer__weight_decay": 0.0}


def taken(run: Run, until: int | None = None) -> Run:
    with run:
        for step in run.steps():
            if step.number == until:
                run.save()
                break
    return run


def equal(left: Tree, right: Tree) -> bool:
    return all(jax.tree.leaves(jax.tree.map(lambda a, b: bool(np.array_equal(a, b)), left, right)))


@pytest.fixture(scope="module")
def adapted(config: Experiment, trained: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Run]:  # noqa: F811
    """Return the workdir of adapters that were trained for four steps from the weights, and their run."""
    workdir = tmp_path_factory.mktemp("adapted") / "run"
    return workdir, taken(begun(config, workdir, trained, **LORA))


def test_adapters_begin_as_the_weights_learn_and_are_all_that_is_saved(
    adapted: tuple[Path, Run],
    trained: Path,  # noqa: F811
) -> None:
    workdir, run = adapted
    assert losses(workdir)[0] == pytest.approx(losses(trained)[4], rel=1e-5)
    assert losses(workdir)[4] != losses(workdir)[0]
    base = stored(trained)
    assert equal(run.base, base)  # bit for bit what they began with
    step = workdir / "checkpoints/4"
    assert sorted(path.name for path in step.iterdir() if path.is_dir()) == ["adapters", "run", "training"]
    saved = {name for name in json.loads((step / "adapters/_METADATA").read_text())["tree_metadata"]}
    assert len(saved) == 4 and all("attention" in name for name in saved)
    # float32 a [3, in, 2] and b [3, 2, out]: qkv from 16 to 48, output from 16 to 16; two moments of each
    assert sum(leaf.size for leaf in jax.tree.leaves(run.state.moments) if leaf.ndim) == 2 * 3 * 2 * (16 + 48 + 16 + 16)


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(
    config: Experiment,
    trained: Path,
    adapted: tuple[Path, Run],
    tmp_path: Path,  # noqa: F811
) -> None:
    taken(begun(config, tmp_path / "run", trained, **LORA), until=2)
    again = taken(begun(config, tmp_path / "run", trained, **LORA))
    assert again.step == 4 and equal(again.state, adapted[1].state)


def test_an_opened_workdir_has_the_adapters_merged(adapted: tuple[Path, Run], tmp_path: Path) -> None:
    workdir, run = adapted
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(1, 24)
    allowed = jnp.ones((1, 24, 24), bool)
    live, opened = params(run), Model.open(workdir)
    expected = model.apply(opened.config, live, tokens, tokens, allowed)
    largest = float(np.abs(expected).max())
    for found in (stored(workdir), arrays.load(open_weights(f"{workdir}@4").parameters)):
        np.testing.assert_allclose(
            model.apply(opened.config, found, tokens, tokens, allowed), expected, atol=1e-5 * largest
        )
    assert main.main(["convert", "merge", "--path", str(workdir), "--out", str(tmp_path / "whole")]) == 0
    assert equal(stored(tmp_path / "whole"), stored(workdir))
    assert Model.open(tmp_path / "whole").tokenizer.digest == opened.tokenizer.digest  # pyright: ignore


def test_adapters_are_for_the_step_that_they_began_with_and_refused_without_it(
    config: Experiment,
    trained: Path,
    tmp_path: Path,  # noqa: F811
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    shutil.copytree(trained, "source")
    taken(begun(config, Path("run"), "source", **LORA), until=2)
    shutil.copytree("source/checkpoints/2", "source/checkpoints/9")  # the base has trained on
    (tmp_path / "new").mkdir()
    for name in ("source", "run"):
        Path(name).rename(tmp_path / "new" / name)  # and all has moved
    monkeypatch.chdir(tmp_path / "new")
    opened = map(open_weights, ("run", "source@4"))
    scales = [weights.parameters["final_norm", "scale"].read((slice(0, 16),)) for weights in opened]
    assert equal(*scales)
    taken(begun(config, Path("run"), "source", **LORA), until=3)
    Path("source/checkpoints/4").rename("source/elsewhere")
    for attempt in (lambda: Model.open("run"), lambda: begun(config, Path("run"), "source", **LORA)):
        with pytest.raises(UserError, match="has no checkpoint of step 4"):
            attempt()
    shutil.copytree("source/checkpoints/2", "source/checkpoints/4")
    for attempt in (lambda: Model.open("run"), lambda: begun(config, Path("run"), "source", **LORA)):
        with pytest.raises(UserError, match="has changed since the adapters"):
            attempt()
    refused = [
        ({"model__vocab_multiple": 512}, "vocab_size to"),
        ({"train__init_from_vocabulary": "resize"}, "needs the vocabulary as it is"),
    ]
    for changes, said in refused:
        with pytest.raises(UserError, match=said):
            begun(config, tmp_path / "other", trained, **LORA, **changes)
    with pytest.raises(UserError, match=r"name the weights that the adapters are for as train\.init_from"):
        with_changes(config, {"train.lora.rank": 2})
    assert not (tmp_path / "other").exists()


def test_frozen_parts_keep_their_bits_through_a_run(
    config: Experiment,
    trained: Path,
    tmp_path: Path,  # noqa: F811
) -> None:
    run = taken(begun(config, tmp_path / "run", trained, train__freeze=("embedding", "blocks/0..1")))
    before, after = stored(trained), params(run)
    assert equal(after["embedding"], before["embedding"]) and not equal(after["final_norm"], before["final_norm"])
    first = jax.tree.map(lambda leaf: leaf[:2], (after["blocks"], before["blocks"]))
    last = jax.tree.map(lambda leaf: leaf[2], (after["blocks"], before["blocks"]))
    assert equal(*first) and not equal(*last)
    assert losses(tmp_path / "run")[4] != losses(tmp_path / "run")[0]
