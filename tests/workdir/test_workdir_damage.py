"""Damage to any file of a workdir is named in one line, or harmless: for a run, for a model and for a report."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.config import Experiment, default_config, resolve, source, with_changes
from glm_jax.errors import UserError
from glm_jax.figures import report
from glm_jax.inference import Model
from glm_jax.storage import digests
from glm_jax.training.run import Run
from glm_jax.workdir import folder, history
from tests.damage import empty, flip

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    texts = tmp_path_factory.mktemp("texts")
    (texts / "en.txt").write_text("\n\n".join(f"Return the {number}th value of an array." for number in range(40)))
    config = default_config()
    values: dict[str, Any] = {
        "model.num_layers": 1, "model.hidden_size": 8, "model.num_heads": 2, "model.ffn_size": 8,
        "data.cache": str(texts / "cache"), "data.seq_length": 32, "data.tokenizer.vocab_size": 300,
        "train.steps": 2, "train.global_batch": 2, "train.microbatches": 1, "train.log_every": 1,
        "train.eval_every": 0, "train.save_every": 1, "optimizer.warmup_samples": 2,
    }  # fmt: skip
    config.update_from_flattened_dict(values)
    config.data.sources.en = source(path=str(texts / "en.txt"))
    return resolve(config)


@pytest.fixture(scope="module")
def whole(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a workdir with checkpoints of steps 1 and 2."""
    workdir = tmp_path_factory.mktemp("whole") / "run"
    with Run(config, workdir, lambda line: None) as run:
        assert [step.number for step in run.steps()] == [1, 2]
    return workdir


@pytest.fixture
def workdir(whole: Path, tmp_path: Path) -> Path:
    return shutil.copytree(whole, tmp_path / "run")


def cut(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


def resumed(config: Experiment, workdir: Path) -> tuple[list[str], int | None]:
    """Return what a resumed run says, and its step; None if it is refused."""
    said: list[str] = []
    try:
        with Run(config, workdir, said.append) as run:
            run.monitor.say = said.append  # type: ignore[method-assign]
            return said, run.step
    except UserError as error:
        return [*said, str(error)], None


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_damage_is_named_or_harmless(
    config: Experiment, whole: Path, tmp_path: Path, damage: Callable[[Path], None], capsys: pytest.CaptureFixture[str]
) -> None:
    outside = {
        str(path.relative_to(whole)) for path in whole.rglob("*") if path.is_file() and "checkpoints" not in str(path)
    }
    assert {name for name in outside if "/" not in name} == {"config.json", "tokenizer.model", "metrics.jsonl"}
    inside = [
        "checkpoints/2/run/metadata",
        "checkpoints/2/digests-0-of-1.json",
    ]  # test_checkpoint_damage has the others
    for name in [*sorted(outside), *inside]:
        workdir = shutil.copytree(whole, tmp_path / "run")
        damage(workdir / name)
        lines = list[str]()
        for use in (Model.open, history.read, report._read_config):
            try:
                use(workdir)
            except UserError as error:
                lines.append(str(error))
        lines += capsys.readouterr().err.splitlines()  # of Model.open
        said, step = resumed(config, workdir)
        lines += said
        assert all("\n" not in line for line in lines), (name, lines)
        if name in inside:
            assert step == 1 and any(line.startswith("checkpoint 2 is skipped: ") for line in said), (name, lines)
        elif name in ("config.json", "tokenizer.model") or (name == "metrics.jsonl" and damage in (empty, Path.unlink)):
            assert any(name in line for line in lines), (name, lines)
        shutil.rmtree(workdir)


def test_any_damage_to_the_log_is_named_or_read(whole: Path, workdir: Path) -> None:
    path = workdir / "metrics.jsonl"
    content = path.read_bytes()
    named = 0
    for place in range(len(content)):
        flipped = content[place] ^ 1 << place % 8
        path.write_bytes(content[:place] + bytes([flipped]) + content[place + 1 :])
        try:
            record = history.read(workdir)
            report.facts(record, {})
            [record.series(kind, key) for kind in record.events for key in record.names(kind, "*")]
        except UserError as error:
            named += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert named > len(content) // 4


@pytest.mark.parametrize(("key", "before", "after"), [("norm", "deepnorm", "pre"), ("position", "rope", "alibi")])
def test_another_model_of_equal_shapes_is_refused(
    config: Experiment, workdir: Path, key: str, before: str, after: str
) -> None:
    path = workdir / "config.json"
    text = path.read_text()
    path.write_text(text.replace(f'"{before}"', f'"{after}"', 1))
    assert path.read_text() != text
    message = f"config.json says model.{key}='{after}', but the checkpoints were trained with '{before}': restore"
    with pytest.raises(UserError, match=message):
        Model.open(workdir)
    with pytest.raises(UserError, match=message):
        folder.check(workdir, with_changes(config, {f"model.{key}": after}))


def test_without_config_json_no_run_resumes_and_none_is_overwritten(config: Experiment, workdir: Path) -> None:
    (workdir / "config.json").unlink()
    said, step = resumed(with_changes(config, {"seed": 5}), workdir)
    assert step is None and "has checkpoints but no config.json: restore the file" in said[-1]
    assert not (workdir / "config.json").exists()


def test_a_checkpoint_without_a_record_of_its_model_is_read(config: Experiment, workdir: Path) -> None:
    for step in (1, 2):
        path = workdir / "checkpoints" / str(step) / "run" / "metadata"
        record = json.loads(path.read_text())
        del record["model"], record["tokenizer"]
        path.write_text(json.dumps(record))
        digests.seal(path.parents[1], digests.files(path.parents[1]))
    model = Model.open(workdir)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(model.decoder.weights))
    assert resumed(config, workdir)[1] == 2
    (workdir / "tokenizer.model").write_bytes(b"")
    with pytest.raises(
        UserError, match="tokenizer.model .*: remove it, and training in this --workdir writes it again"
    ):
        Model.open(workdir)


def test_a_removed_tokenizer_is_written_again_if_it_is_the_same(config: Experiment, whole: Path, workdir: Path) -> None:
    (workdir / "tokenizer.model").unlink()
    other = with_changes(config, {"data.tokenizer.vocab_size": 290})
    (workdir / "config.json").write_text((workdir / "config.json").read_text().replace("300", "290"))
    said, step = resumed(other, workdir)
    assert step is None and "have another tokenizer than these sources" in said[-1]
    assert not (workdir / "tokenizer.model").exists()
    shutil.copy(whole / "config.json", workdir)
    assert resumed(config, workdir)[1] == 2
    assert (workdir / "tokenizer.model").read_bytes() == (whole / "tokenizer.model").read_bytes()
