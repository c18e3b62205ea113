"""Hugging Face folders: the class's own numbers, tensors that come back equal, errors that name the culprit.

tests/goldens/README.md says what the goldens are; the library safetensors says what is in the files that are written.
"""

import dataclasses
import itertools
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


def test_the_same_files_have_the_same_digest_and_others_another(sharded: Path, tmp_path: Path) -> None:
    whole = open_weights(shutil.copytree(GOLDENS, tmp_path / "copy")).digest
    assert whole == open_weights(GOLDENS).digest != open_weights(GOLDENS / "sharded").digest
    (tmp_path / "copy/README.md").write_text("words")
    assert open_weights(tmp_path / "copy").digest == whole
    root = shutil.copytree(sharded, tmp_path / "sharded")  # whose files may have any names
    index = json.loads((root / INDEX).read_text())
    for name in sorted(set(index["weight_map"].values())):
        (root / name).rename(root / name.replace("model", "part"))
    index["weight_map"] = {tensor: name.replace("model", "part") for tensor, name in index["weight_map"].items()}
    (root / INDEX).write_text(json.dumps(index))
    before = open_weights(root).digest
    file = sorted(root.glob("part*"))[-1]
    save_file({name: tensor + 1 for name, tensor in load_file(file).items()}, file)
    assert open_weights(root).digest != before


def edit(change: Callable[[dict[str, np.ndarray]], Any]) -> Callable[[Path], Any]:
    """Make a damage that changes the tensors of the second file."""

    def damage(root: Path) -> None:
        file = sorted(root.glob("*.safetensors"))[1]
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file)

    return damage


def edit_json(name: str, **values: Any) -> Callable[[Path], Any]:
    """Make a damage that sets what a JSON file says."""

    def damage(root: Path) -> None:
        content = json.loads((root / name).read_text())
        (root / name).write_text(json.dumps({**content, **values}))

    return damage


def edit_index(change: Callable[[dict[str, Any]], Any]) -> Callable[[Path], Any]:
    """Make a damage of the index."""

    def damage(root: Path) -> None:
        index = json.loads((root / INDEX).read_text())
        change(index["weight_map"])
        (root / INDEX).write_text(json.dumps(index))

    return damage


def edit_header(change: Callable[[bytes], bytes]) -> Callable[[Path], Any]:
    """Make a damage of the header of the second file, whose length is brought up to date."""

    def damage(root: Path) -> None:
        file = sorted(root.glob("*.safetensors"))[1]
        content = file.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        header = change(content[8:end])
        file.write_bytes(len(header).to_bytes(8, "little") + header + content[end:])

    return damage


def second(change: Callable[[Path], Any]) -> Callable[[Path], Any]:
    return lambda root: change(sorted(root.glob("*.safetensors"))[1])


def overlap(header: bytes) -> bytes:
    """Let the second tensor begin where the first does."""
    values = json.loads(header)
    names = [name for name in values if name != "__metadata__"]
    start = values[names[0]]["data_offsets"][0]
    values[names[1]]["data_offsets"][0] = start
    return json.dumps(values).encode()


INDEX, CONFIG, FILE = "model.safetensors.index.json", "config.json", "model-00002-of-0000"
DAMAGES: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "truncated": (second(lambda file: os.truncate(file, os.path.getsize(file) - 4)), [FILE, "safetensors"]),
    "empty": (second(lambda file: os.truncate(file, 0)), [FILE]),
    "header beyond the file": (
        second(lambda file: file.write_bytes((2**40).to_bytes(8, "little") + file.read_bytes()[8:])),
        [FILE, "safetensors"],
    ),
    "overlapping offsets": (edit_header(overlap), [FILE, "safetensors"]),
    "header of no JSON": (edit_header(lambda header: b"{" + header), [FILE, "safetensors"]),
    "nested header": (edit_header(lambda header: b"[" * 100_000), [FILE, "safetensors"]),
    "no file": (second(lambda file: file.write_bytes(b"no safetensors")), [FILE]),
    "a pipe": (second(lambda file: (file.unlink(), os.mkfifo(file))), [FILE, "missing"]),
    "missing shard": (second(Path.unlink), [FILE, "missing", INDEX]),
    "shape": (edit(lambda tensors: tensors.update({DENSE: tensors[DENSE][:-1]})), [FILE, DENSE, "[7, 8]", "[8, 8]"]),
    "integers": (edit(lambda tensors: tensors.update({DENSE: tensors[DENSE].astype("int8")})), [FILE, DENSE, "I8"]),
    "tensor that the index lacks": (edit(lambda tensors: tensors.update(lm_head=np.zeros(2))), [FILE, "lm_head"]),
    "tensor that the file lacks": (edit(lambda tensors: tensors.pop(DENSE)), [INDEX, FILE, DENSE]),
    "index of another file": (
        edit_index(lambda places: places.update({DENSE: "model-9.safetensors"})),
        ["model-9.safetensors", "missing", INDEX],
    ),
    "index outside": (
        edit_index(lambda places: places.update({DENSE: "../a.safetensors"})),
        [INDEX, "../a.safetensors"],
    ),
    "index with one tensor less": (edit_index(lambda places: places.pop(DENSE)), [INDEX, FILE, DENSE]),
    "index with one tensor more": (
        edit_index(lambda places: places.update(extra=places[DENSE])),
        [INDEX, FILE, "extra"],
    ),
    "index of numbers": (edit_index(lambda places: places.update({DENSE: 7})), [INDEX, "weight_map"]),
    "index without a map": (lambda root: (root / INDEX).write_text("{}"), [INDEX, "weight_map"]),
    "index of no JSON": (lambda root: (root / INDEX).write_text("{"), [INDEX, "JSON"]),
    "no weights": (lambda root: (root / INDEX).unlink(), ["model.safetensors", "pytorch_model.bin"]),
    "no config": (lambda root: (root / CONFIG).unlink(), [CONFIG, "missing"]),
    "config of no JSON": (lambda root: (root / CONFIG).write_text("model_type: glm"), [CONFIG, "JSON"]),
    "config of bytes": (lambda root: (root / CONFIG).write_bytes(b"\xff\x00"), [CONFIG, "JSON"]),
    "nested config": (lambda root: (root / CONFIG).write_text("[" * 10**6), [CONFIG, "JSON"]),
    "long config": (lambda root: (root / CONFIG).write_text(" " * 2**25), [CONFIG, "bytes"]),
    "list": (lambda root: (root / CONFIG).write_text("[]"), [CONFIG, "object"]),
    "no model type": (lambda root: (root / CONFIG).write_text("{}"), [CONFIG, "model_type is None"]),
    "chatglm": (edit_json(CONFIG, model_type="chatglm"), [CONFIG, "chatglm models have another architecture"]),
    "bert": (edit_json(CONFIG, model_type="bert"), [CONFIG, "model_type is 'bert'"]),
    "glm-4": (edit_json(CONFIG, num_key_value_heads=2), [CONFIG, "GlmForCausalLM"]),
    "relative positions": (edit_json(CONFIG, relative_encoding=True), [CONFIG, "relative_encoding is True"]),
    "one position": (edit_json(CONFIG, block_position_encoding=False), [CONFIG, "block_position_encoding is False"]),
    "spell": (edit_json(CONFIG, spell_length=8), [CONFIG, "spell_length is 8"]),
    "scale": (edit_json(CONFIG, attention_scale=0.5), [CONFIG, "attention_scale is 0.5"]),
    "infinite scale": (edit_json(CONFIG, attention_scale=float("inf")), [CONFIG, "pb_relax is inf"]),
    "large scale": (edit_json(CONFIG, attention_scale=10**400), [CONFIG, "too large"]),
    "relu": (edit_json(CONFIG, hidden_act="relu"), [CONFIG, "hidden_act is 'relu'"]),
    "table": (edit_json(CONFIG, hidden_act={}), [CONFIG, "hidden_act is {}"]),
    "no size": (edit_json(CONFIG, hidden_size=None), [CONFIG, "hidden_size is None"]),
    "bool": (edit_json(CONFIG, num_layers=True), [CONFIG, "num_layers is True"]),
    "many layers": (edit_json(CONFIG, num_layers=10**12), [CONFIG, "num_layers is 1000000000000"]),
    "heads": (edit_json(CONFIG, num_attention_heads=3), [CONFIG, "not divisible"]),
    "negative": (edit_json(CONFIG, vocab_size=-7), [CONFIG, "vocab_size is -7"]),
    "other vocabulary": (edit_json(CONFIG, vocab_size=25), ["glm.word_embeddings.weight", "[24, 8]", "[25, 8]"]),
    "fewer layers": (edit_json(CONFIG, num_layers=1), ["glm.transformer.layers.1.", "not a tensor of this model"]),
    "more layers": (edit_json(CONFIG, num_layers=3), [INDEX, "glm.transformer.layers.2.", "missing"]),
}


@pytest.fixture(scope="module")
def sharded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("sharded") / "sharded"
    huggingface.save(root, SMALL, noise(SMALL), max_shard_bytes=5000)
    return root


@pytest.mark.parametrize("case", DAMAGES)
def test_damage_gives_one_line_with_file_and_reason(case: str, sharded: Path, tmp_path: Path) -> None:
    damage, words = DAMAGES[case]
    root = tmp_path / "folder"
    shutil.copytree(sharded, root)
    huggingface.load(root, huggingface.config(root))
    damage(root)
    with pytest.raises(UserError) as caught:
        weights = open_weights(root)
        convert.to_workdir(weights, tmp_path / "run", convert.experiment(weights.config))
    message = str(caught.value)
    assert "\n" not in message and str(root) in message and len(message) < 500
    for word in words:
        assert word in message
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.parametrize(
    "content, words",
    [
        ({"a": 1}, ["'a' is not a tensor but int"]),
        ([1], ["no table of tensors"]),
    ],
)
def test_a_torch_file_of_something_else_is_refused(content: Any, words: list[str], tmp_path: Path) -> None:
    archives.write(tmp_path / "pytorch_model.bin", archives.dump(content), {})
    with pytest.raises(UserError, match=words[0]):
        huggingface.load(tmp_path, SMALL)


@pytest.mark.parametrize(
    "change, options, words",
    [
        ({}, {"dtype": "float64"}, ["float64", "float32, float16, bfloat16"]),
        ({"norm": "deepnorm"}, {}, ["model.norm deepnorm", "pre"]),
        ({"position": "rope"}, {}, ["model.position rope", "learned_2d"]),
        ({"activation": "geglu"}, {}, ["model.activation geglu", "gelu or gelu_tanh"]),
        ({"ffn_size": 24}, {}, ["model.ffn_size 24", "32"]),
        ({"norm_epsilon": 1e-6}, {}, ["model.norm_epsilon 1e-06"]),
        ({"embedding_norm": True}, {}, ["model.embedding_norm True"]),
        ({"vocab_size": 25}, {}, ["embedding.word", "[24, 8]", "[25, 8]"]),
    ],
)
def test_save_refuses_what_does_not_fit(
    change: dict[str, Any], options: dict[str, Any], words: list[str], tmp_path: Path
) -> None:
    with pytest.raises(UserError) as caught:
        huggingface.save(tmp_path / "new/out", dataclasses.replace(SMALL, **change), noise(SMALL), **options)
    for word in words:
        assert word in str(caught.value)
    assert os.listdir(tmp_path) == []


def test_save_overwrites_nothing_and_leaves_nothing_half_written(tmp_path: Path) -> None:
    params = noise(SMALL)
    params["final_norm"]["bias"][3] = -7e4
    with pytest.raises(UserError, match=r"glm\.transformer\.final_layernorm\.bias has the value 70000"):
        huggingface.save(tmp_path / "out", SMALL, params, dtype="float16")
    assert os.listdir(tmp_path) == []
    (tmp_path / "precious").write_text("mine")
    with pytest.raises(UserError, match="exists already"):
        huggingface.save(tmp_path, SMALL, params)
    assert os.listdir(tmp_path) == ["precious"]


def test_a_missing_library_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "safetensors", None)
    with pytest.raises(UserError, match=r"pip install -e '\.\[huggingface\]'"):
        huggingface.load(GOLDENS / "safetensors", GOLDEN)


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
