"""`train.init_from`: a run begins with somebody's weights and records which; all else is its own."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from glm_jax.cli import main
from glm_jax.config import Experiment, default_config, resolve, source, to_json, with_changes
from glm_jax.data.tokenizers.sentencepiece import train
from glm_jax.errors import UserError
from glm_jax.interop import sat
from glm_jax.training.run import Run
from glm_jax.types import Tree
from tests.end_to_end.runs import in_process
from tests.patience import HANG

pytestmark = pytest.mark.slow

LEARNED = {"model.position": "learned_2d", "model.max_length": 40}


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """Return a run of 4 steps whose loss changes at each of them."""
    texts = tmp_path_factory.mktemp("texts")
    (texts / "en.txt").write_text("\n\n".join(f"Return the {number}th value of an array." for number in range(80)))
    made = default_config()
    values: dict[str, Any] = {
        "model.num_layers": 3, "model.hidden_size": 16, "model.num_heads": 2, "model.ffn_size": 16,
        "model.vocab_multiple": 16, "data.cache": str(texts / "cache"), "data.seq_length": 32, "data.heldout": 0.3,
        "data.tokenizer.vocab_size": 300, "train.steps": 4, "train.global_batch": 4, "train.microbatches": 2,
        "train.log_every": 1, "train.eval_every": 4, "train.eval_rows": 8, "train.save_every": 2,
        "optimizer.peak_lr": 0.05, "optimizer.min_lr": 0.05, "optimizer.warmup_samples": 2,
    }  # fmt: skip
    made.update_from_flattened_dict(values)
    made.data.sources.en = source(path=str(texts / "en.txt"))
    return resolve(made)


@pytest.fixture(scope="module")
def trained(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workdir of the finished run."""
    return finished(config, tmp_path_factory.mktemp("trained") / "run")


@pytest.fixture(scope="module")
def learned(config: Experiment, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the workdir of a model with learned positions."""
    return finished(with_changes(config, LEARNED), tmp_path_factory.mktemp("learned") / "run")


def finished(config: Experiment, workdir: Path) -> Path:
    with Run(config, workdir, lambda line: None) as run:
        for _ in run.steps():
            pass
    return workdir


def losses(workdir: Path) -> dict[int, float]:
    """Return the held-out losses by step."""
    lines = map(json.loads, (workdir / "metrics.jsonl").read_text().splitlines())
    return {line["step"]: line["loss"] for line in lines if line["event"] == "evaluation"}


def begun(config: Experiment, workdir: Path, weights: object, said: list[str] | None = None, **changes: object) -> Run:
    """Return a run that begins with weights; keys as in `model__num_layers=4`."""
    named = {key.replace("__", "."): value for key, value in changes.items()}
    return Run(with_changes(config, {"train.init_from": str(weights), **named}), workdir,
               (said if said is not None else []).append)  # fmt: skip


def params(run: Run) -> Tree:
    return jax.device_get(run.params)


def test_a_run_begins_where_the_weights_are_and_with_nothing_else_of_theirs(
    config: Experiment, trained: Path, tmp_path: Path
) -> None:
    before = losses(trained)
    assert abs(before[4] - before[0]) > 0.1
    said: list[str] = []
    with begun(config, tmp_path / "run", trained, said) as run:
        assert (run.step, run.samples, int(run.state.step), int(run.state.samples)) == (0, 0, 0, 0)
        assert all((np.asarray(leaf) == 0).all() for leaf in jax.tree.leaves(run.state.moments))
        assert run.evaluate()["loss"] == pytest.approx(before[4], rel=1e-5)
    (line,) = map(json.loads, (tmp_path / "run/interventions.jsonl").read_text().splitlines())
    assert (line["step"], line["cause"], line["changes"]) == (0, "init_from", {})
    assert (line["weights"]["path"], line["weights"]["step"], line["weights"]["kind"]) == (str(trained), 4, "workdir")
    assert len(line["weights"]["digest"]) == 64
    assert json.loads((tmp_path / "run/config.json").read_text())["train"]["init_from"] == str(trained)
    assert any(line.startswith("tokenizer: that of") for line in said)
    assert f"weights: those of {trained}, step 4" in said


def test_a_run_begins_from_a_hugging_face_folder(config: Experiment, tmp_path: Path) -> None:
    original = with_changes(config, {**LEARNED, "model.norm": "pre", "model.activation": "gelu", "model.ffn_size": 64})
    workdir = finished(original, tmp_path / "run")
    assert main.main(["convert", "orbax-to-hf", f"--path={workdir}", f"--out={tmp_path / 'glm'}"]) == 0
    own = str(workdir / "tokenizer.model")
    with begun(original, tmp_path / "again", tmp_path / "glm", data__tokenizer__path=own) as run:
        assert run.evaluate()["loss"] == pytest.approx(losses(workdir)[4], rel=1e-5)
    with pytest.raises(UserError, match=r"has no tokenizer: name the file of its own as data\.tokenizer\.path"):
        begun(original, tmp_path / "other", tmp_path / "glm")


@pytest.mark.parametrize("named", ["{}@2", "{}/checkpoints/2"])
def test_a_step_can_be_named(config: Experiment, trained: Path, named: str, tmp_path: Path) -> None:
    with (
        begun(config, tmp_path / "named", named.format(trained)) as run,
        begun(config, tmp_path / "new", trained) as new,
    ):
        with Run(config, shutil.copytree(trained, tmp_path / "copy"), lambda line: None) as old:
            old.restore(2)
            jax.tree.map(np.testing.assert_array_equal, params(run), params(old))
        assert any((one != other).any() for one, other in zip(
            jax.tree.leaves(params(run)), jax.tree.leaves(params(new)), strict=True))  # fmt: skip


def test_a_run_resumes_without_the_weights_it_began_with(config: Experiment, trained: Path, tmp_path: Path) -> None:
    weights = shutil.copytree(trained, tmp_path / "weights")
    with begun(config, tmp_path / "run", weights) as run:
        for _ in run.steps():
            break
        run.save()
    shutil.rmtree(weights)
    with begun(config, tmp_path / "run", weights) as run:
        assert run.step == 1 and [step.number for step in run.steps()] == [2, 3, 4]
        digest = run.prepared.tokenizer.digest
    assert digest == hashlib.sha256((trained / "tokenizer.model").read_bytes()).hexdigest()
    assert [
        line["cause"] for line in map(json.loads, (tmp_path / "run/interventions.jsonl").read_text().splitlines())
    ] == ["init_from"]
    with pytest.raises(UserError, match=r"was made with train\.init_from='.*weights', this config says ''"):
        Run(config, tmp_path / "run", lambda line: None)
    shutil.rmtree(tmp_path / "run/checkpoints")
    with pytest.raises(UserError, match="weights does not exist"):
        begun(config, tmp_path / "run", weights)


@pytest.mark.parametrize(
    "changes, problem",
    [
        ({"model.num_layers": 4}, "with num_layers 3, not model.num_layers=4: set it so, or name other weights"),
        ({"model.hidden_size": 32}, "with hidden_size 16, not model.hidden_size=32"),
        ({"model.num_heads": 4}, "with num_heads 2, not model.num_heads=4"),
        ({"model.ffn_size": 32}, "with ffn_size 16, not model.ffn_size=32"),
        ({"model.norm": "pre"}, "with norm 'deepnorm', not model.norm='pre'"),
        ({"model.position": "alibi"}, "with position 'rope', not model.position='alibi'"),
        ({"model.activation": "gelu"}, "with activation 'geglu', not model.activation='gelu'"),
        ({"model.norm_epsilon": 1e-6}, "with norm_epsilon 1e-05, not model.norm_epsilon=1e-06"),
        ({"model.embedding_norm": True}, "with embedding_norm False, not model.embedding_norm=True"),
        ({"model.qk_norm": True}, "with qk_norm False, not model.qk_norm=True"),
        ({"data.tokenizer.path": "other.model"}, "the tokenizer other.model is not the one of"),
        ({"train.init_from": "nowhere"}, "train.init_from: nowhere does not exist: name a workdir"),
        ({"train.init_from": "empty"}, "train.init_from: empty holds no weights"),
        ({"train.init_from": "{}@3"}, "has no checkpoint of step 3, but these: 2, 4"),
        ({"train.init_from": "damaged"}, "params/.* is missing"),
        ({"train.init_from": "sat"}, "sat has no tokenizer: name the file of its own as data.tokenizer.path"),
        ({"train.init_from": "sat", "data.tokenizer.path": "large.model"}, "sat has a vocabulary of 272, the"),
        ({"train.init_from": "sat", "model.num_layers": 2}, "with num_layers 3, not model.num_layers=2"),
        ({"train.init_from": "{}/checkpoints/4/params"}, "holds no weights"),
    ],
)  # fmt: skip
def test_other_weights_are_refused_before_anything_is_written(
    config: Experiment, trained: Path, changes: dict[str, Any], problem: str, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("empty").mkdir()
    Path("other.model").write_bytes(train(["bring apples and pears"] * 20, 280))
    Path("large.model").write_bytes(train([f"apples {number} pears" for number in range(999)] * 2, 420))
    if "sat" in changes.values():
        save_official(config, trained, Path("sat"), rows=272)
    if "damaged" in changes.values():
        shutil.copytree(trained, "damaged")
        for step in (2, 4):
            next(Path(f"damaged/checkpoints/{step}/params").rglob("manifest.ocdbt")).unlink()
    before = sorted(os.listdir())
    weights = changes.pop("train.init_from", "{}").format(trained)
    named = {key.replace(".", "__"): value for key, value in changes.items()}
    with pytest.raises(UserError, match=problem) as raised:
        begun(config, tmp_path / "run", weights, **named)
    assert "\n" not in str(raised.value)
    assert sorted(os.listdir()) == before


def save_official(config: Experiment, workdir: Path, out: Path, rows: int | None = None) -> None:
    """Write the params of a finished run as an official checkpoint, with the first `rows` of its vocabulary."""
    with Run(config, shutil.copytree(workdir, out.with_name("copy")), lambda line: None) as run:
        found = params(run)
        cfg = dataclasses.replace(run.model, vocab_size=rows or run.model.vocab_size)
    shutil.rmtree(out.with_name("copy"))
    found["embedding"]["word"] = found["embedding"]["word"][:rows]
    sat.save(out, cfg, found, tensor_parallel=2, iteration=9)


@pytest.mark.parametrize("kind, multiple", [("workdir", 512), ("step", 1), ("sat", 64)])
def test_rows_of_a_padded_vocabulary_are_cut_or_added(
    config: Experiment, trained: Path, kind: str, multiple: int, tmp_path: Path
) -> None:
    weights, tokenizer = trained, str(trained / "tokenizer.model")
    if kind == "sat":
        save_official(config, trained, weights := tmp_path / "sat")
    elif kind == "step":
        weights = shutil.copytree(trained / "checkpoints/4", tmp_path / "4")
    changes = {"model__vocab_multiple": multiple, "data__tokenizer__path": tokenizer}
    with begun(config, tmp_path / "run", weights, **changes) as run:
        assert run.model.vocab_size % multiple == 0
        assert run.evaluate()["loss"] == pytest.approx(losses(trained)[4], rel=1e-5)


def test_another_vocabulary_keeps_rows_by_number(config: Experiment, trained: Path, tmp_path: Path) -> None:
    larger = with_changes(config, {"data.tokenizer.vocab_size": 310, "train.init_from_vocabulary": "resize"})
    with Run(config, shutil.copytree(trained, tmp_path / "copy"), lambda line: None) as run:
        theirs, pieces = params(run), run.prepared.tokenizer.size
    with begun(larger, tmp_path / "fresh", "") as run:
        fresh = params(run)
    with begun(larger, tmp_path / "run", trained) as run:
        found = params(run)
        assert run.prepared.tokenizer.size > pieces
    words = [tree["embedding"].pop("word") for tree in (theirs, fresh, found)]
    np.testing.assert_array_equal(words[2], np.concatenate([words[0][:pieces], words[1][pieces:]]))
    jax.tree.map(np.testing.assert_array_equal, theirs, found)


def test_a_longer_table_keeps_the_trained_positions(config: Experiment, learned: Path, tmp_path: Path) -> None:
    longer = with_changes(config, LEARNED | {"model.max_length": 64})
    with begun(longer, tmp_path / "fresh", "") as run:
        fresh = params(run)["embedding"]
    with begun(longer, tmp_path / "run", learned) as run:
        assert run.evaluate()["loss"] == pytest.approx(losses(learned)[4], rel=1e-5)
        found = params(run)["embedding"]
    for name in ("position", "block_position"):
        assert (found[name][:40] != fresh[name][:40]).any(axis=1).all()
        np.testing.assert_array_equal(found[name][40:], fresh[name][40:])


@in_process
def test_a_corpus_is_built_with_the_tokenizer_of_the_weights(
    config: Experiment, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = to_json(with_changes(config, {"data.tokenizer.vocab_size": 290, "train.init_from": str(trained)}))
    (tmp_path / "mine.py").write_text(f"import json\ndef get_config():\n    return json.loads({other!r})\n")
    assert main.main(["corpus", "build", f"--config={tmp_path / 'mine.py'}", "--workers=1"]) == 0
    said = capsys.readouterr().err
    assert f"tokenizer: that of {trained}" in said
    assert re.search(r"shards en: .*cached", said), said  # the ones that the weights were trained on


MESH = """
import json, sys
import jax, numpy as np
from pathlib import Path
from glm_jax.config import from_json
from glm_jax.training.run import Run
with Run(from_json(Path(sys.argv[1]).read_text()), Path(sys.argv[2]), lambda line: None) as run:
    moments = max(float(abs(np.asarray(leaf)).max()) for leaf in jax.tree.leaves(run.state.moments))
    loss = run.evaluate()["loss"]
    next(run.steps())
    print("REPORT", json.dumps([loss, moments, dict(run.stretch.mesh.shape)]))
"""


def test_the_weights_begin_on_a_mesh_with_a_padded_pipeline(config: Experiment, trained: Path, tmp_path: Path) -> None:
    sizes = {"data": 2, "pipeline": 2, "tensor": 2}  # three layers over two stages, and hidden over data
    changes = {"train.init_from": str(trained), **{f"mesh.{axis}": size for axis, size in sizes.items()}}
    (tmp_path / "config.json").write_text(to_json(with_changes(config, changes)))
    done = subprocess.run(
        [sys.executable, "-c", MESH, str(tmp_path / "config.json"), str(tmp_path / "run")],
        env={**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"},
        capture_output=True, text=True, timeout=HANG,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    loss, moments, mesh = json.loads(done.stdout.partition("REPORT ")[2])
    assert loss == pytest.approx(losses(trained)[4], rel=1e-5) and moments == 0 and mesh == sizes
