"""Hugging Face folders: the class's own numbers, tensors that come back equal, errors that name the culprit.

tests/goldens/README.md says what the goldens are; the library safetensors says what is in the files that are written.
"""

import dataclasses
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from test_convert import restore
from test_sat import GLM_10B, assert_equal, noise
from test_sat import GOLDENS as ALL_GOLDENS

from glm_jax.errors import UserError
from glm_jax.interop import convert, huggingface, layout, sat, torch_archive
from glm_jax.interop.torch_archive import read_archive
from glm_jax.interop.weights import open_weights
from glm_jax.model import GLMConfig, apply

GOLDENS = ALL_GOLDENS / "hf_glm"
GOLDEN = GLMConfig(3, 48, 4, 192, 304, 41, norm="pre", position="learned_2d", activation="gelu")
SMALL = GLMConfig(2, 8, 2, 32, 24, 7, norm="pre", position="learned_2d", activation="gelu")
LOGITS, LOSS, GRADIENT = 5e-4, 1e-5, 2e-4
INDEX, CONFIG, FILE = "model.safetensors.index.json", "config.json", "model-00002-of-0000"
DENSE = "glm.transformer.layers.1.attention.dense.weight"


def golden_tensors() -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in read_archive(GOLDENS / "pytorch_model.bin").items()}


def tensors_of(folder: Path) -> dict[str, np.ndarray]:
    """Read all tensors of a folder by the library."""
    files = map(load_file, sorted(folder.glob("*.safetensors")))
    return {name: array for tensors in files for name, array in tensors.items()}


def test_the_config_is_that_of_the_class() -> None:
    assert huggingface.config(GOLDENS) == GOLDEN


def mean_loss(params: Any, batch: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
    """Return the mean cross-entropy over places with a label, and the logits [B, S, V]."""
    labels = batch["labels"]
    logits = apply(GOLDEN, params, batch["tokens"], batch["positions"], batch["allowed"])
    chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), jnp.maximum(labels, 0)[..., None], -1)[..., 0]
    return -jnp.sum(chosen, where=labels != -100) / jnp.sum(labels != -100), logits


def padded(golden: dict[str, np.ndarray], batch: int = 3, length: int = 40) -> dict[str, jax.Array]:
    """Pad a case without changing its numbers, so that all cases are one compile."""
    rows, size = golden["tokens"].shape
    places = np.arange(length)
    context = places < np.pad(golden["sep"], (0, batch - rows))[:, None, None]  # [B, 1, S], keys that all may see
    extra, columns = (0, batch - rows), (0, length - size)
    arrays = {
        "tokens": np.pad(golden["tokens"], (extra, columns)),
        "positions": np.pad(golden["positions"], (extra, (0, 0), columns)),
        "labels": np.pad(golden["labels"], (extra, columns), constant_values=-100),
    }
    return {
        "allowed": jnp.asarray(context | (places <= places[:, None])),  # [B, S, S]
        **{name: jnp.asarray(array, jnp.int32) for name, array in arrays.items()},
    }


@pytest.mark.slow
def test_logits_loss_and_gradients_are_those_of_the_class() -> None:
    params = huggingface.load(GOLDENS, GOLDEN)
    with np.load(GOLDENS / "cases.npz") as arrays:
        cases = sorted({name.split("/")[0] for name in arrays})
        goldens = [{name[2:]: arrays[name] for name in arrays if name.startswith(f"{case}/")} for case in cases]
    assert len(cases) == 3
    differentiated = jax.jit(jax.value_and_grad(mean_loss, has_aux=True))
    for golden in goldens:
        (loss, logits), gradients = differentiated(params, padded(golden))
        rows, size = golden["tokens"].shape
        np.testing.assert_allclose(logits[:rows, :size], golden["logits"], rtol=0, atol=LOGITS)
        np.testing.assert_allclose(loss, golden["loss"], rtol=0, atol=LOSS)
        qkv = gradients["blocks"]["attention"]["qkv"]["kernel"][0]  # [D, N, 3, K]
        for ours, name in (
            (gradients["embedding"]["word"], "gradient_word_embeddings"),
            (qkv.transpose(2, 1, 3, 0).reshape(144, 48), "gradient_qkv_0"),  # three blocks of rows
        ):
            np.testing.assert_allclose(ours, golden[name], rtol=0, atol=GRADIENT * np.abs(golden[name]).max())


@pytest.mark.parametrize("folder", ["sharded", "safetensors"])
def test_every_kind_of_folder_gives_the_same_params(folder: str) -> None:
    assert huggingface.config(GOLDENS / folder) == GOLDEN
    assert_equal(huggingface.load(GOLDENS / folder, GOLDEN), huggingface.load(GOLDENS, GOLDEN))


@pytest.mark.parametrize("dtype", huggingface.DTYPES)
@pytest.mark.parametrize("limit", [10**9, 100_000, 1])
def test_what_is_written_holds_the_same_tensors(
    dtype: str, limit: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, kind = tmp_path / "out", torch_archive.DTYPES[dtype][1]
    params = huggingface.load(GOLDENS, GOLDEN)
    with monkeypatch.context() as patch:
        patch.setattr(layout, "CHUNK_BYTES", 5000)
        huggingface.save(out, GOLDEN, params, dtype=dtype, max_shard_bytes=limit)
    wanted = {name: array.astype(kind) for name, array in golden_tensors().items()}
    assert_equal(tensors_of(out), wanted)
    files = {file.name: load_file(file) for file in sorted(out.glob("*.safetensors"))}
    headers = [int.from_bytes(file.read_bytes()[:8], "little") for file in out.glob("*.safetensors")]
    assert all(length % 8 == 0 for length in headers)  # so that tensors are aligned
    if limit == 10**9:
        assert sorted(os.listdir(out)) == ["config.json", "model.safetensors"]
    else:
        assert list(files) == [
            f"model-{number:05d}-of-{len(files):05d}.safetensors" for number in range(1, len(files) + 1)
        ]
        sizes = [sum(array.nbytes for array in tensors.values()) for tensors in files.values()]
        assert all(size <= limit or len(tensors) == 1 for size, tensors in zip(sizes, files.values(), strict=True))
        assert all(one + other > limit for one, other in itertools.pairwise(sizes))
        assert json.loads((out / INDEX).read_text()) == {
            "metadata": {"total_size": sum(sizes)},
            "weight_map": {tensor: name for name, tensors in files.items() for tensor in tensors},
        }
    assert huggingface.config(out) == GOLDEN
    assert_equal(huggingface.load(out, GOLDEN), jax.tree.map(lambda leaf: leaf.astype(kind).astype("float32"), params))


def test_the_written_config_has_the_fields_of_the_class(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "out", GOLDEN, huggingface.load(GOLDENS, GOLDEN), dtype="bfloat16")
    golden, ours = (json.loads((folder / "config.json").read_text()) for folder in (GOLDENS, tmp_path / "out"))
    del golden["transformers_version"]
    assert golden.keys() <= ours.keys() and golden["auto_map"].items() <= ours["auto_map"].items()
    differing = {name for name in golden if ours[name] != golden[name]}
    assert differing == {"attention_dropout_prob", "auto_map", "embedding_dropout_prob", "output_dropout_prob",
                         "torch_dtype"}  # fmt: skip
    assert ours["torch_dtype"] == "bfloat16"


@pytest.mark.parametrize("change", [{"activation": "gelu_tanh"}, {"pb_relax": 8.0}])
def test_what_the_file_can_say_is_read_back(change: dict[str, Any], tmp_path: Path) -> None:
    cfg = dataclasses.replace(SMALL, **change)
    huggingface.save(tmp_path / "out", cfg, noise(cfg))
    assert huggingface.config(tmp_path / "out") == cfg


def test_sat_and_hugging_face_hold_the_same_tensors(tmp_path: Path) -> None:
    path = ALL_GOLDENS / "glm10b_style/ckpt_tp1"
    huggingface.save(tmp_path / "out", GLM_10B, sat.load(path, GLM_10B))
    other = {
        "transformer.word_embeddings.weight": "word_embeddings.weight",
        "mixins.block_position_embedding.block_position_embeddings.weight":
            "transformer.block_position_embeddings.weight",
    }  # fmt: skip
    expected = {"glm." + other.get(name, name): array for name, array in sat.read_tensors(path).items()}
    written = tensors_of(tmp_path / "out")
    assert_equal(written, {name: expected[name].astype(np.float32) for name in expected})


@pytest.mark.parametrize("dtype", [np.float64, np.float16])
def test_names_without_a_prefix_and_other_floats_load(dtype: type, tmp_path: Path) -> None:
    huggingface.save(tmp_path / "out", SMALL, noise(SMALL))  # the noise fits float16
    tensors = tensors_of(tmp_path / "out")
    bare = {name.removeprefix("glm."): array.astype(dtype) for name, array in tensors.items()}
    save_file(bare, tmp_path / "out/model.safetensors")
    assert_equal(huggingface.load(tmp_path / "out", SMALL), jax.tree.map(jnp.asarray, noise(SMALL)))


def test_conversion_to_a_workdir_and_back(tmp_path: Path) -> None:
    weights = open_weights(GOLDENS / "sharded")
    assert (weights.kind, weights.config, weights.step, weights.tokenizer) == ("huggingface", GOLDEN, 0, None)
    convert.to_workdir(weights, tmp_path / "run", convert.experiment(weights.config))
    params = huggingface.load(GOLDENS, GOLDEN)
    assert_equal(restore(tmp_path / "run/checkpoints", params), params)
    convert.orbax_to_hf(open_weights(tmp_path / "run"), tmp_path / "out")
    assert_equal(tensors_of(tmp_path / "out"), golden_tensors())


def test_the_user_says_which_gelu_and_nothing_that_the_folder_contradicts(tmp_path: Path) -> None:
    assert open_weights(GOLDENS, {"activation": "gelu_tanh"}).config.activation == "gelu_tanh"
    for key, value in (("num_layers", 7), ("norm", "post"), ("activation", "geglu"), ("position", "rope")):
        with pytest.raises(UserError, match=f"holds a model with {key}"):
            open_weights(GOLDENS, {key: value})


SHARDED = """
import json, sys
import jax, numpy as np
from glm_jax.interop import huggingface, layout
from glm_jax.model import logical_axes
layout.CHUNK_BYTES = 3000
path = sys.argv[1]
cfg = huggingface.config(path)
mesh = jax.make_mesh((2, 2, 2), ("data", "pipeline", "tensor"), axis_types=(jax.sharding.AxisType.Auto,) * 3)
rules = {"layers": "pipeline", "heads": "tensor", "ffn": "tensor", "vocab": "tensor"}
shardings = jax.tree.map(lambda axes: jax.NamedSharding(mesh, jax.P(*map(rules.get, axes))), logical_axes(cfg),
                         is_leaf=lambda axes: isinstance(axes, tuple))
sharded, whole = huggingface.load_sharded(path, cfg, shardings), huggingface.load(path, cfg)
pairs = list(zip(*map(jax.tree.leaves, (sharded, whole, shardings)), strict=True))
kernel = sharded["blocks"]["attention"]["qkv"]["kernel"]
print(json.dumps({"equal": all(np.array_equal(left, right) for left, right, _ in pairs),
                  "shardings": all(left.sharding == sharding for left, _, sharding in pairs),
                  "shard": kernel.addressable_shards[0].data.shape}))
"""


@pytest.mark.slow
@pytest.mark.oldest
def test_loading_onto_a_mesh_gives_each_device_its_part(tmp_path: Path) -> None:
    huggingface.save(tmp_path / "out", SMALL, noise(SMALL), dtype="bfloat16", max_shard_bytes=2000)
    environment = {**os.environ, "JAX_NUM_CPU_DEVICES": "8", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "error", "-c", SHARDED, str(tmp_path / "out")]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    assert json.loads(output) == {"equal": True, "shardings": True, "shard": [1, 8, 1, 3, 4]}
