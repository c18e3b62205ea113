"""Official checkpoints: what goes out comes back, shards are those of the official rules, errors name the culprit."""

import dataclasses
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import archives
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from glm_jax.errors import UserError
from glm_jax.interop import layout, sat, torch_archive
from glm_jax.interop.torch_archive import TensorStream, read_archive, write_archive
from glm_jax.model import GLMConfig, init

GOLDENS = Path(__file__).parent.parent / "goldens"
GLM_130B = GLMConfig(num_layers=3, hidden_size=64, num_heads=4, ffn_size=176, vocab_size=256)
GLM_10B = GLMConfig(3, 64, 4, 256, 256, 65, norm="pre", position="learned_2d", activation="gelu_tanh")
GOLDEN_FOLDERS = [("glm130b/ckpt_tp1", GLM_130B), ("glm130b/ckpt_tp2", GLM_130B), ("glm10b_style/ckpt_tp1", GLM_10B)]
SMALL = GLMConfig(num_layers=2, hidden_size=24, num_heads=4, ffn_size=20, vocab_size=40, max_length=9)
VARIANTS = [
    SMALL,
    dataclasses.replace(SMALL, norm="sandwich", activation="gelu"),
    dataclasses.replace(SMALL, norm="post", position="alibi"),
    dataclasses.replace(SMALL, norm="pre", position="learned_2d", activation="gelu_tanh"),
    dataclasses.replace(SMALL, norm="sandwich", position="learned_2d"),
]


def noise(cfg: GLMConfig) -> Any:
    """Make params whose every entry is another number, which float16 holds."""
    shapes = jax.eval_shape(lambda: init(cfg, jax.random.key(0)))
    random = np.random.default_rng(0)
    return jax.tree.map(lambda leaf: random.standard_normal(leaf.shape).astype("float16").astype("float32"), shapes)


def assert_equal(left: Any, right: Any) -> None:
    """Compare two trees of arrays, bit for bit."""
    assert jax.tree.structure(left) == jax.tree.structure(right)
    for one, other in zip(jax.tree.leaves(left), jax.tree.leaves(right), strict=True):
        assert one.dtype == other.dtype and one.shape == other.shape
        assert np.asarray(one).tobytes() == np.asarray(other).tobytes()


@pytest.mark.parametrize("ranks", [1, 2, 4])
@pytest.mark.parametrize("folder, cfg", GOLDEN_FOLDERS)
def test_load_save_load_changes_no_bit(folder: str, cfg: GLMConfig, ranks: int, tmp_path: Path) -> None:
    params = sat.load(GOLDENS / folder, cfg)
    sat.save(tmp_path / "out", cfg, params, tensor_parallel=ranks, iteration=12)
    assert (tmp_path / "out/latest").read_bytes() == b"12"
    assert sorted(os.listdir(tmp_path / "out/12")) == [f"mp_rank_{r:02d}_model_states.pt" for r in range(ranks)]
    assert_equal(sat.load(tmp_path / "out", cfg), params)
    before, after = sat.read_tensors(GOLDENS / folder), sat.read_tensors(tmp_path / "out")
    assert_equal(after, {name: array.astype(np.float32) for name, array in before.items()})
    assert not any("inv_freq" in name for rank in range(ranks) for name in raw_tensors(tmp_path / "out/12", rank))


def raw_tensors(directory: Path, rank: int) -> dict[str, np.ndarray]:
    """Read one rank's tensors as they are in its file."""
    module = read_archive(directory / f"mp_rank_{rank:02d}_model_states.pt")["module"]
    return {name: tensor.read() for name, tensor in module.items()}


def test_shards_are_those_of_the_official_tool(tmp_path: Path) -> None:
    params = sat.load(GOLDENS / "glm130b/ckpt_tp1", GLM_130B)
    sat.save(tmp_path / "out", GLM_130B, params, tensor_parallel=2, iteration=1000, dtype="float16")
    for rank in (0, 1):
        golden = raw_tensors(GOLDENS / "glm130b/ckpt_tp2/1000", rank)
        golden = {name: array for name, array in golden.items() if "inv_freq" not in name}
        ours = raw_tensors(tmp_path / "out/1000", rank)
        assert_equal(ours, golden)


def test_merged_tensors_are_those_of_one_rank() -> None:
    one, two = (sat.read_tensors(GOLDENS / f"glm130b/ckpt_tp{ranks}") for ranks in (1, 2))
    assert {array.dtype for array in one.values()} == {np.dtype(np.float32)}
    assert {array.dtype for array in two.values()} == {np.dtype(np.float16)}
    assert_equal({name: array.astype(np.float32) for name, array in two.items()}, one)
    raw = raw_tensors(GOLDENS / "glm130b/ckpt_tp1/1000", 0)
    del raw["mixins.rotary-embedding.rotary_emb.inv_freq"]
    assert_equal(one, raw)


@pytest.mark.parametrize("cfg", VARIANTS)
@pytest.mark.parametrize("chunk", [200, 2**25])
def test_every_kind_of_model_round_trips(
    cfg: GLMConfig, chunk: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layout, "CHUNK_BYTES", chunk)
    monkeypatch.setattr(torch_archive, "MAP_BYTES", chunk)
    params = noise(cfg)
    merged = []
    for ranks in (1, 2, 4):
        path = tmp_path / str(ranks)
        sat.save(path, cfg, params, tensor_parallel=ranks, iteration=0, dtype="float16")
        assert_equal(sat.load(path, cfg), params)
        merged.append(sat.read_tensors(path))
    assert_equal(merged[0], merged[1])
    assert_equal(merged[0], merged[2])


def test_the_original_layout_packs_blocks_on_each_rank(tmp_path: Path) -> None:
    cfg = VARIANTS[3]
    params = noise(cfg)
    sat.save(tmp_path / "out", cfg, params, tensor_parallel=2, iteration=0)
    kernel = params["blocks"]["attention"]["qkv"]["kernel"][1]  # [D, N, 3, K]
    weight = raw_tensors(tmp_path / "out/0", 1)["transformer.layers.1.attention.query_key_value.weight"]
    blocks = [kernel[:, 2:, part].reshape(24, 12).T for part in range(3)]  # the second rank's q, k and v
    np.testing.assert_array_equal(weight, np.concatenate(blocks))
    sandwich = sat_tensors(VARIANTS[1], tmp_path / "sandwich")
    scale = noise(VARIANTS[1])["blocks"]["feedforward_output_norm"]["scale"]
    np.testing.assert_array_equal(sandwich["transformer.layers.1.fourth_layernorm.weight"], scale[1])


def sat_tensors(cfg: GLMConfig, path: Path) -> dict[str, np.ndarray]:
    sat.save(path, cfg, noise(cfg), tensor_parallel=1, iteration=0)
    return raw_tensors(path / "0", 0)


def test_bfloat16_files_load(tmp_path: Path) -> None:
    tensors = sat_tensors(SMALL, tmp_path / "one")
    tensors = {name: array.astype(jnp.bfloat16) for name, array in tensors.items()}
    rewrite(tmp_path / "one/0/mp_rank_00_model_states.pt", tensors)
    loaded = sat.load(tmp_path / "one", SMALL)
    assert_equal(loaded, jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16).astype(np.float32), noise(SMALL)))


def rewrite(file: Path, tensors: dict[str, np.ndarray]) -> None:
    streams = {name: TensorStream(array.shape, array.dtype, [array]) for name, array in tensors.items()}
    write_archive(file, "module", streams)


def edit(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], None]:
    """Make a damage that changes the tensors of the second rank."""

    def damage(root: Path) -> None:
        tensors = raw_tensors(root / "7", 1)
        change(tensors)
        rewrite(root / "7/mp_rank_01_model_states.pt", tensors)

    return damage


def shorten(name: str) -> Callable[[dict[str, np.ndarray]], Any]:
    return lambda tensors: tensors.update({name: tensors[name][:-1]})


DENSE = "transformer.layers.1.attention.dense.weight"
DAMAGES = {
    "shape": (edit(shorten(DENSE)), ["mp_rank_01", DENSE, "[23, 12]", "[24, 12]"]),
    "missing key": (edit(lambda tensors: tensors.pop(DENSE)), ["mp_rank_01", DENSE, "missing"]),
    "extra key": (edit(lambda tensors: tensors.update(lm_head=np.zeros(2))), ["mp_rank_01", "lm_head", "not a tensor"]),
    "extra layer": (
        edit(lambda tensors: tensors.update({DENSE.replace("1", "2"): tensors[DENSE]})),
        ["mp_rank_01", DENSE.replace("1", "2")],
    ),
    "int8": (
        edit(lambda tensors: tensors.update({DENSE: tensors[DENSE].astype(np.int8)})),
        ["mp_rank_01", DENSE, "int8"],
    ),
    "mixed": (
        edit(lambda tensors: tensors.update({DENSE: tensors[DENSE].astype(np.float16)})),
        ["mp_rank_01", DENSE, "float16"],
    ),
    "missing first rank": (lambda root: (root / "7/mp_rank_00_model_states.pt").unlink(), ["mp_rank_00", "missing"]),
    "missing last rank": (lambda root: (root / "7/mp_rank_01_model_states.pt").unlink(), ["mp_rank_00", "rank"]),
    "no ranks": (lambda root: [file.unlink() for file in (root / "7").iterdir()], ["mp_rank_00", "missing"]),
    "no latest": (lambda root: (root / "latest").unlink(), ["latest"]),
    "wrong latest": (lambda root: (root / "latest").write_text("8"), ["latest", "'8'"]),
    "outside latest": (lambda root: (root / "latest").write_text("../7"), ["latest", "'../7'"]),
    "truncated": (
        lambda root: os.truncate(root / "7/mp_rank_01_model_states.pt", 5000),
        ["mp_rank_01_model_states.pt", "zip"],
    ),
    "no tensor": (
        lambda root: archives.write(
            root / "7/mp_rank_01_model_states.pt", archives.dump({"module": {"global_step": 7}}), {}
        ),
        ["mp_rank_01_model_states.pt", "global_step", "int"],
    ),
    "no module": (
        lambda root: write_archive(root / "7/mp_rank_01_model_states.pt", "model", {}),
        ["mp_rank_01_model_states.pt", "module"],
    ),
    "ranks that do not divide": (
        lambda root: shutil.copy(root / "7/mp_rank_00_model_states.pt", root / "7/mp_rank_02_model_states.pt"),
        [
            "mp_rank_02_model_states.pt",
            "3 tensor-parallel ranks do not divide vocab_size 40",
            "transformer.word_embeddings.weight",
        ],
    ),
}


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_gives_one_line_with_file_key_and_reason(case: str, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    root = tmp_path / "official"
    sat.save(root, SMALL, noise(SMALL), tensor_parallel=2, iteration=7)
    sat.load(root, SMALL)
    damage(root)
    with pytest.raises(UserError) as caught:
        sat.load(root, SMALL)
    message = str(caught.value)
    assert "\n" not in message and str(root) in message
    for word in words:
        assert word in message
    with pytest.raises(UserError):
        sat.read_tensors(root)


def test_both_kinds_of_rotary_tables_are_accepted(tmp_path: Path) -> None:
    tensors = sat_tensors(SMALL, tmp_path / "one")
    for name in ("transformer.layers.0.attention.rotary_emb.inv_freq", "mixins.rotary-embedding.rotary_emb.inv_freq"):
        tensors[name] = np.ones(3, np.float16)
    rewrite(tmp_path / "one/0/mp_rank_00_model_states.pt", tensors)
    assert_equal(sat.load(tmp_path / "one", SMALL), noise(SMALL))


def test_a_scheme_that_official_checkpoints_do_not_have_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layout, "SAT_NORMS", ("deepnorm", "post"))
    with pytest.raises(UserError, match="no norm scheme 'pre': model.norm must be one of deepnorm, post"):
        layout.rules(dataclasses.replace(SMALL, norm="pre"))


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, {"tensor_parallel": 3}, ["3 tensor-parallel ranks do not divide vocab_size 40"]),
        ({}, {"tensor_parallel": 8}, ["8 tensor-parallel ranks do not divide num_heads 4"]),
        ({}, {"tensor_parallel": 0}, ["at least 1"]),
        ({}, {"dtype": "int8"}, ["int8", "float32 or float16"]),
        ({}, {"iteration": -1}, ["iteration"]),
        ({"norm": "sandwich"}, {}, ["blocks.attention_output_norm.bias is missing"]),
        ({"position": "learned_2d"}, {}, ["embedding.block_position is missing"]),
        ({"ffn_size": 24}, {}, ["blocks.feedforward.down.kernel", "[2, 20, 24]", "[2, 24, 24]"]),
        ({"embedding_norm": True}, {}, ["embedding norm"]),
        ({"qk_norm": True}, {}, ["no norms on queries and keys", "model.qk_norm must be off"]),
    ],
)
def test_save_refuses_what_does_not_fit(
    change: dict[str, Any], options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    cfg = dataclasses.replace(SMALL, **change)
    with pytest.raises(UserError) as caught:
        sat.save(tmp_path / "out", cfg, noise(SMALL), **{"tensor_parallel": 1, "iteration": 0, **options})
    for word in words:
        assert word in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_save_refuses_numbers_too_large_and_leaves_nothing(tmp_path: Path) -> None:
    params = noise(SMALL)
    params["final_norm"]["bias"][3] = -7e4
    with pytest.raises(UserError, match=r"transformer\.final_layernorm\.bias has the value 70000"):
        sat.save(tmp_path / "out", SMALL, params, tensor_parallel=1, iteration=0, dtype="float16")
    assert os.listdir(tmp_path) == []


def test_save_overwrites_nothing(tmp_path: Path) -> None:
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        sat.save(tmp_path, SMALL, noise(SMALL), tensor_parallel=1, iteration=0)
    assert os.listdir(tmp_path) == ["precious"]


SHARDED = """
import json, sys
import jax, numpy as np
from glm_jax.interop import layout, sat
from glm_jax.model import GLMConfig, logical_axes
layout.CHUNK_BYTES = 3000
path, cfg = sys.argv[1], GLMConfig(4, 24, 4, 20, 40)
mesh = jax.make_mesh((2, 2, 2), ("data", "pipeline", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
rules = {"layers": "pipeline", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
shardings = jax.tree.map(lambda axes: jax.NamedSharding(mesh, jax.P(*map(rules.get, axes))), logical_axes(cfg),
                         is_leaf=lambda axes: isinstance(axes, tuple))
sharded, whole = sat.load_sharded(path, cfg, shardings), sat.load(path, cfg)
pairs = list(zip(*map(jax.tree.leaves, (sharded, whole, shardings)), strict=True))
kernel = sharded["blocks"]["attention"]["qkv"]["kernel"]
print(json.dumps({"equal": all(np.array_equal(left, right) for left, right, _ in pairs),
                  "shardings": all(left.sharding == sharding for left, _, sharding in pairs),
                  "shard": kernel.addressable_shards[0].data.shape}))
"""


@pytest.mark.slow
@pytest.mark.oldest
def test_loading_onto_a_mesh_gives_each_device_its_part(tmp_path: Path) -> None:
    cfg = dataclasses.replace(SMALL, num_layers=4)
    sat.save(tmp_path / "one", cfg, noise(cfg), tensor_parallel=4, iteration=0)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(tmp_path / "one")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(output) == {"equal": True, "shardings": True, "shard": [2, 24, 2, 3, 6]}
