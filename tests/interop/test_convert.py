"""Conversion to orbax and back: orbax restores what was written, its own files convert too, nothing half-done stays."""

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_sat import GLM_10B, GLM_130B, GOLDENS, SMALL, assert_equal, noise

from glm_jax.config import files, resolve
from glm_jax.config.fields import to_dict
from glm_jax.errors import UserError
from glm_jax.inference import Model
from glm_jax.interop import convert, describe, layout, sat
from glm_jax.interop.layout import axis_sizes, rules
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig, apply
from glm_jax.storage import digests
from glm_jax.workdir import folder
from glm_jax.workdir.checkpoint_format import open_params
from tests.stored import stored


def to_workdir(path: Path, cfg: GLMConfig, out: Path) -> Path:
    """Convert an official checkpoint, without a tokenizer."""
    return convert.to_workdir(open_weights(path, to_dict(cfg)), out, convert.experiment(cfg))


def restore(directory: Path, params: Any) -> Any:
    """Restore the newest step as a training run would."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params)
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))["params"]


@pytest.mark.parametrize("chunk", [3000, 2**25])
@pytest.mark.parametrize("kind, cfg", [("glm130b/ckpt_tp2", GLM_130B), ("glm10b_style/ckpt_tp1", GLM_10B)])
def test_there_and_back(kind: str, cfg: GLMConfig, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk)
    step = to_workdir(GOLDENS / kind, cfg, tmp_path / "ours")
    assert step == tmp_path / "ours/checkpoints" / (GOLDENS / kind / "latest").read_text()
    params = sat.load(GOLDENS / kind, cfg)
    assert_equal(restore(tmp_path / "ours/checkpoints", params), params)
    assert folder.read_config(tmp_path / "ours").glm(0) == cfg
    assert digests.damage(step) is None
    convert.orbax_to_sat(open_weights(tmp_path / "ours"), tmp_path / "official", 4)
    assert_equal(sat.load(tmp_path / "official", cfg), params)
    assert (tmp_path / "official/latest").read_text() == step.name
    convert.orbax_to_sat(open_weights(step), tmp_path / "half", 1, iteration=5, dtype="float16")
    assert (tmp_path / "half/latest").read_text() == "5"
    before, after = sat.read_tensors(GOLDENS / kind), sat.read_tensors(tmp_path / "half")
    assert_equal(after, {name: array.astype(np.float16) for name, array in before.items()})


@pytest.mark.parametrize("kind, cfg", [("glm130b", GLM_130B), ("glm10b_style", GLM_10B)])
def test_a_converted_workdir_gives_the_official_logits(kind: str, cfg: GLMConfig, tmp_path: Path) -> None:
    to_workdir(GOLDENS / kind / "ckpt_tp1", cfg, tmp_path / "ours")
    model = Model.open(tmp_path / "ours")
    assert model.tokenizer is None
    with np.load(GOLDENS / kind / "cases.npz") as arrays:
        tokens, positions, blocked, valid, expected = (
            arrays[f"gmask/{name}"] for name in ("tokens", "position_ids", "blocked", "valid", "logits")
        )
    logits = np.asarray(apply(model.config, stored(tmp_path / "ours"), tokens, positions, ~blocked))
    np.testing.assert_allclose(logits[valid], expected[valid], rtol=0, atol=5e-4)


def test_what_orbax_saved_converts(tmp_path: Path) -> None:
    params = jax.tree.map(jax.numpy.asarray, noise(SMALL))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (5, 10):
            shifted = jax.tree.map(lambda leaf, step=step: leaf + step, params)
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(shifted)))
    weights = open_weights(tmp_path / "checkpoints", to_dict(SMALL))
    assert weights.config == SMALL and (weights.kind, weights.step) == ("orbax", 10)
    convert.orbax_to_sat(weights, tmp_path / "official", 2)
    assert (tmp_path / "official/latest").read_text() == "10"
    assert_equal(sat.load(tmp_path / "official", SMALL), jax.tree.map(lambda leaf: leaf + 10, params))


def test_stored_chunks_are_small_and_fit_the_ranks() -> None:
    cfg = GLMConfig(num_layers=70, hidden_size=12288, num_heads=96, ffn_size=32768, vocab_size=150528)
    for rule in rules(cfg):
        tile, shape = convert._stored_tile(cfg, rule), rule.our_shape(axis_sizes(cfg))
        assert 4 * np.prod(tile) <= layout.CHUNK_BYTES
        assert all(size % step == 0 for size, step in zip(shape, tile, strict=True))
        if rule.split:
            axis = rule.ours.index(rule.split) + rule.stacked
            assert shape[axis] // 8 % tile[axis] == 0


def test_errors_name_the_place_and_leave_nothing(tmp_path: Path) -> None:
    source = GOLDENS / "glm130b/ckpt_tp1"
    with pytest.raises(UserError, match=r"ckpt_tp1 holds a model with vocab_size 256, not model.vocab_size=512"):
        to_workdir(source, dataclasses.replace(GLM_130B, vocab_size=512), tmp_path / "ours")
    with pytest.raises(UserError, match="checkpoints does not exist: name a workdir"):
        open_weights(tmp_path / "checkpoints")
    with pytest.raises(UserError, match="holds no weights: name a workdir"):
        open_weights(tmp_path)
    assert os.listdir(tmp_path) == []
    step = to_workdir(source, GLM_130B, tmp_path / "ours")
    with pytest.raises(UserError, match="ours exists already"):
        to_workdir(source, GLM_130B, tmp_path / "ours")
    with pytest.raises(UserError, match="3 tensor-parallel ranks do not divide"):
        convert.orbax_to_sat(open_weights(step), tmp_path / "official", 3)
    with pytest.raises(UserError, match=r"ours has no checkpoint of step 7, but these: 1000"):
        open_weights(f"{tmp_path}/ours@7")
    bare = tmp_path / "bare"
    shutil.copytree(step, bare)
    with pytest.raises(UserError, match=r"bare does not say which model it holds"):
        open_weights(bare, {"num_heads": 4})
    with pytest.raises(UserError, match=r"params: blocks\.attention\.output\.bias has shape \[3, 64\].*\[2, 64\]"):
        open_weights(bare, to_dict(dataclasses.replace(GLM_130B, num_layers=2)))
    with pytest.raises(UserError, match="bare is not named after its step"):
        convert.orbax_to_sat(open_weights(bare, to_dict(GLM_130B)), tmp_path / "official", 1)
    for where, given in ((step, {}), (bare, to_dict(GLM_130B))):
        (where / "params/embedding.word/.zarray").unlink()
        with pytest.raises(UserError, match=r"params/embedding\.word/\.zarray is missing"):
            open_weights(where, given)
    (bare / "digests-0-of-1.json").unlink()  # as orbax alone would have saved it
    with pytest.raises(UserError, match="cannot be read as an orbax checkpoint"):
        open_weights(bare, to_dict(GLM_130B))
    assert sorted(os.listdir(tmp_path)) == ["bare", "ours"]


def official(root: Path, cfg: GLMConfig, declared: object = None) -> Path:
    """Write a checkpoint of noise, with a model_config.json if there is something to declare."""
    sat.save(root, cfg, noise(cfg), tensor_parallel=2, iteration=3)
    if declared is not None:
        (root / "model_config.json").write_text(declared if isinstance(declared, str) else json.dumps(declared))
    return root


SANDWICH = dataclasses.replace(SMALL, norm="sandwich", activation="gelu", max_length=2048)
LEARNED = dataclasses.replace(SMALL, norm="post", position="learned_2d", activation="gelu")


@pytest.mark.parametrize(
    "cfg, declared, given",
    [
        (dataclasses.replace(SMALL, max_length=2048), None, {"num_heads": 4}),
        (dataclasses.replace(SMALL, max_length=12), {"num_attention_heads": 4, "max_sequence_length": 12}, {}),
        (dataclasses.replace(SMALL, max_length=2048), {"num_attention_heads": 4, "layernorm_order": "post"}, {}),
        (SANDWICH, None, {"num_heads": 4, "activation": "gelu"}),
        (LEARNED, {"layernorm_order": "post", "num_attention_heads": 4}, {"activation": "gelu"}),
        (dataclasses.replace(LEARNED, norm="pre", activation="gelu_tanh"), None, {"num_heads": 4}),
        (dataclasses.replace(LEARNED, norm_epsilon=1e-4), {"layernorm_epsilon": 1e-4},
         {"num_heads": 4, "norm": "post", "activation": "gelu"}),
    ],
)  # fmt: skip
def test_a_model_is_known_by_its_tensors_its_file_and_what_is_given(
    cfg: GLMConfig, declared: object, given: dict[str, object], tmp_path: Path
) -> None:
    assert open_weights(official(tmp_path / "sat", cfg, declared), given).config == cfg


@pytest.mark.parametrize(
    "cfg, declared, given, problem",
    [
        (SMALL, None, {}, "sat does not show its num_heads: give --config.model.num_heads=VALUE"),
        (SMALL, None, {"num_heads": 5}, "hidden_size 24 is not divisible by num_heads 5"),
        (SMALL, None, {"num_heads": -4}, "model.num_heads is -4, it must be at least 1"),
        (SMALL, None, {"num_heads": 4, "num_layers": 3}, r"with num_layers 2, not model.num_layers=3: set it so"),
        (SMALL, None, {"num_heads": 4, "norm": "sandwich"}, "with norm 'deepnorm' or 'post' or 'pre', not model.norm="),
        (SMALL, None, {"num_heads": 4, "position": "learned_2d"}, "with position 'rope' or 'alibi', not model.pos"),
        (SMALL, None, {"num_heads": 4, "activation": "gelu"}, "with activation 'geglu', not model.activation='gelu'"),
        (SMALL, {"num_attention_heads": 4}, {"num_heads": 2}, "with num_heads 4, not model.num_heads=2"),
        (dataclasses.replace(SMALL, activation="gelu"), None, {"num_heads": 4}, "does not show its norm: give"),
        (SMALL, {"num_layers": 7}, {"num_heads": 4}, r"model_config.json says num_layers=7, but .*rank_00.* has 2"),
        (SMALL, {"num_attention_heads": "4"}, {}, "model.num_heads is '4', it must be of type int"),
        (SMALL, "[1", {"num_heads": 4}, "model_config.json should hold a JSON object"),
        (SMALL, "[" * 100_000, {"num_heads": 4}, "model_config.json should hold a JSON object"),
        (SMALL, " " * 2**20 + "{}", {"num_heads": 4}, "model_config.json should hold a JSON object"),
    ],
)
def test_contradictions_and_what_nobody_says_are_one_line(
    cfg: GLMConfig, declared: object, given: dict[str, object], problem: str, tmp_path: Path
) -> None:
    root = official(tmp_path / "sat", cfg, declared)
    with pytest.raises(UserError, match=problem) as raised:
        open_weights(root, given)
    assert "\n" not in str(raised.value)


def test_the_heads_of_published_models_are_those_of_the_experiments() -> None:
    left = dict(describe.HEADS)
    for file in sorted((Path(__file__).parents[2] / "experiments").glob("glm_*.py")):
        model = resolve(files.config(file)).model
        assert describe.HEADS[model.num_layers, model.hidden_size] == model.num_heads, file
        left.pop((model.num_layers, model.hidden_size), None)
    assert left == {}


@pytest.mark.parametrize(
    "metadata",
    ["", "null", "[]", '"x"', "{}", '{"tree_metadata": [2]}', '{"tree_metadata": {"a": 3}}', "[" * 100_000,
     '{"tree_metadata": {"a": {"key_metadata": [{"key": 5}]}}}', '{"tree_metadata": {"a": {"key_metadata": [{}]}}}',
     '{"tree_metadata": {"a": {"key_metadata": [{"key": "a"}]}}}'],
)  # fmt: skip
def test_metadata_of_any_shape_is_one_line(metadata: str, tmp_path: Path) -> None:
    (tmp_path / "params").mkdir()
    (tmp_path / "params/_METADATA").write_text(metadata)
    with pytest.raises(UserError, match="cannot be read as an orbax checkpoint"):
        open_params(tmp_path)
