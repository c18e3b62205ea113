"""Conversion to orbax and back: orbax restores what was written, its own files convert too, nothing half-done stays."""

import dataclasses
import os
from pathlib import Path
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from test_sat import GLM_10B, GLM_130B, GOLDENS, SMALL, assert_equal, noise

from glm_jax.errors import UserError
from glm_jax.interop import convert, layout, sat
from glm_jax.interop.layout import axis_sizes, rules
from glm_jax.model import GLMConfig


def restore(directory: Path, params: Any) -> Any:
    """Restore the newest step as a training run would."""
    device = jax.sharding.SingleDeviceSharding(jax.devices()[0])
    target = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=device), params)
    with ocp.CheckpointManager(directory) as manager:
        step = manager.latest_step()
        return manager.restore(step, args=ocp.args.Composite(params=ocp.args.StandardRestore(target)))["params"]


@pytest.mark.parametrize("chunk", [3000, 2**25])
@pytest.mark.parametrize("folder, cfg", [("glm130b/ckpt_tp2", GLM_130B), ("glm10b_style/ckpt_tp1", GLM_10B)])
def test_there_and_back(
    folder: str, cfg: GLMConfig, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk)
    step = convert.sat_to_orbax(GOLDENS / folder, cfg, tmp_path / "checkpoints")
    assert step == tmp_path / "checkpoints" / (GOLDENS / folder / "latest").read_text()
    params = sat.load(GOLDENS / folder, cfg)
    assert_equal(restore(tmp_path / "checkpoints", params), params)
    convert.orbax_to_sat(tmp_path / "checkpoints", cfg, tmp_path / "official", 4)
    assert_equal(sat.load(tmp_path / "official", cfg), params)
    assert (tmp_path / "official/latest").read_text() == step.name
    convert.orbax_to_sat(step, cfg, tmp_path / "half", 1, iteration=5, dtype="float16")
    assert (tmp_path / "half/latest").read_text() == "5"
    before, after = sat.read_tensors(GOLDENS / folder), sat.read_tensors(tmp_path / "half")
    assert_equal(after, {name: array.astype(np.float16) for name, array in before.items()})


def test_what_orbax_saved_converts(tmp_path: Path) -> None:
    params = jax.tree.map(jax.numpy.asarray, noise(SMALL))
    with ocp.CheckpointManager(tmp_path / "checkpoints") as manager:
        for step in (5, 10):
            shifted = jax.tree.map(lambda leaf, step=step: leaf + step, params)
            manager.save(step, args=ocp.args.Composite(params=ocp.args.StandardSave(shifted)))
    convert.orbax_to_sat(tmp_path / "checkpoints", SMALL, tmp_path / "official", 2)
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
    with pytest.raises(UserError, match=r"mp_rank_00.*final_layernorm|mp_rank_00.*has shape"):
        convert.sat_to_orbax(source, dataclasses.replace(GLM_130B, vocab_size=512), tmp_path / "checkpoints")
    with pytest.raises(UserError, match="holds no checkpoint with the item 'params'"):
        convert.orbax_to_sat(tmp_path / "checkpoints", GLM_130B, tmp_path / "official", 1)
    assert os.listdir(tmp_path) == []
    step = convert.sat_to_orbax(source, GLM_130B, tmp_path / "checkpoints")
    with pytest.raises(UserError, match="1000 exists already"):
        convert.sat_to_orbax(source, GLM_130B, tmp_path / "checkpoints")
    with pytest.raises(UserError, match=r"params: embedding\.word has shape \[256, 64\].*\[512, 64\]"):
        convert.orbax_to_sat(step, dataclasses.replace(GLM_130B, vocab_size=512), tmp_path / "official", 1)
    with pytest.raises(UserError, match="3 tensor-parallel ranks do not divide"):
        convert.orbax_to_sat(step, GLM_130B, tmp_path / "official", 3)
    (step / "params/embedding.word/.zarray").unlink()
    with pytest.raises(UserError, match=r"1000 is damaged \(params/embedding\.word/\.zarray is missing\)"):
        convert.orbax_to_sat(step, GLM_130B, tmp_path / "official", 1)
    (step / "digests-0-of-1.json").unlink()  # as orbax alone would have saved it
    with pytest.raises(UserError, match="cannot be read as an orbax checkpoint"):
        convert.orbax_to_sat(step, GLM_130B, tmp_path / "official", 1)
    assert os.listdir(tmp_path) == ["checkpoints"] and os.listdir(tmp_path / "checkpoints") == ["1000"]
